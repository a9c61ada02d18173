"""TRL's ``GRPOConfig`` with the keys of trust region, target and frozen models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, get_args

from trl.trainer.grpo_config import GRPOConfig

from qtarget.composed.regularised import Regularised
from qtarget.composed.taught import Taught
from qtarget.core.errors import ConfigError
from qtarget.core.regions import TrustRegion
from qtarget.core.types import Target
from qtarget.integrations.rl.refusals import TAUGHT, refuse_advantages, refuse_half_generations, refuse_settings
from qtarget.integrations.shared.numbers import check_numbers
from qtarget.integrations.shared.warned import pin_where_there_is_need, use_new_names
from qtarget.loss.backends import Backend
from qtarget.registry import get_target, get_trust_region

ANCHORS = ("rollout", "old")


@dataclass
class QTargetGRPOConfig(GRPOConfig):
    """TRL's ``GRPOConfig`` plus the choice of trust region, target, and the policy that ratios are taken to.

    ``loss_type`` says how tokens are averaged and nothing else: ``dapo`` (over the tokens of the batch), ``grpo`` (each
    sequence's mean, then over sequences), ``dr_grpo`` (sum over tokens, divided by ``max_completion_length``).

    Args:
        trust_region: how far a sample is trusted (`qtarget targets`); null for distillation without rewards.
        trust_region_kwargs: its thresholds.
        advantage: ``reward``, or ``teacher``: ``log p_T - log pi`` of each sampled token, without rewards.
        target: a divergence to a teacher at every sampled token (reverse_kl, forward_kl, generalized_jsd, skew_kl, ...).
        target_kwargs: its hyper-parameters.
        target_weight: its factor, beside a trust region.
        anchor: whose log-probs the ratio is taken to: ``rollout``, the policy that sampled, or ``old``, the trained model at
            the time, recomputed; by default ``rollout`` where the sampler tells log-probs, else ``old``.
        kept_samples: of each log line, in ``qtarget_rollouts.jsonl``: what `qtarget inspect` and `qtarget report` show.
        listed_outcomes: how many tokens ``outcomes: listed`` of a trust region sees; all others are one outcome.
        skip_without_signal: tokens with an advantage of 0 skip the head, whose loss and gradient they do not change; what is
            logged of ratios and entropy is then of the other tokens.
        teacher_model_name_or_path: a frozen model, run live on every sample; also the anchor of ``target: reverse_kl``.
        teacher: ``self`` (the policy as it is), ``base`` (as it was before training; with LoRA the adapter is off) or ``ema``
            (a slow mean of what it has been), in place of another model; or the URL of a server (`qtarget serve`, vLLM, SGLang).
        teacher_top_k: tokens that a server lists; all others are one outcome.
        teacher_decay: what the slow teacher keeps of itself at every optimizer step.
        privileged_column: a column that the teacher sees and the policy does not, such as the solution.
        privileged_template: the teacher's prompt, of ``{prompt}`` (or the last message) and ``{privileged}``.
        reference_model_name_or_path: the same for targets that read a reference.
        vocab_padding: see ``QTargetConfig``.
        loss_backend: see ``qtarget.linear_target_loss``.
        allow_new_weights: see ``QTargetConfig``.
        scale_rewards: as in TRL; the default is "none", the group's mean alone.
        disable_dropout: as in TRL; the default is True, as a sampler's log-probs know no dropout.
        vllm_importance_sampling_correction: as in TRL; by default only with ``anchor: old``, because a ratio to the
            sampler corrects already.
    """

    trust_region: str | None = field(default="dppo_tv", metadata={"help": "How far a sample is trusted."})
    trust_region_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Thresholds of the trust region, as a mapping or a JSON string."}
    )
    advantage: str = field(
        default="reward", metadata={"help": "What says how good a sample is.", "choices": ["reward", TAUGHT]}
    )
    target: str | None = field(default=None, metadata={"help": "A divergence to a teacher, at every sampled token."})
    target_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the target, as a mapping or a JSON string."}
    )
    target_weight: float = field(default=1.0, metadata={"help": "Factor of the target beside a trust region."})
    anchor: str | None = field(
        default=None, metadata={"help": "Whose log-probs ratios are taken to.", "choices": list(ANCHORS)}
    )
    skip_without_signal: bool = field(
        default=False, metadata={"help": "Skip tokens whose advantage is 0; statistics are then of the others."}
    )
    listed_outcomes: int = field(default=20, metadata={"help": "Tokens that outcomes: listed of a trust region sees."})
    kept_samples: int = field(default=4, metadata={"help": "Samples of each log line that are kept for inspection."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Frozen teacher, run live."})
    teacher: str | None = field(
        default=None, metadata={"help": "The policy as its own teacher (self, base, ema), or the URL of a server."}
    )
    teacher_top_k: int = field(default=20, metadata={"help": "Tokens that a teacher behind a URL lists."})
    teacher_decay: float = field(default=0.99, metadata={"help": "What teacher: ema keeps of itself at a step."})
    privileged_column: str | None = field(
        default=None, metadata={"help": "What the teacher sees and the policy does not."}
    )
    privileged_template: str = field(
        default="{prompt}\n\nReference solution:\n{privileged}\n",
        metadata={"help": "The prompt that the teacher sees."},
    )
    reference_model_name_or_path: str | None = field(default=None, metadata={"help": "Frozen reference, run live."})
    vocab_padding: str = field(
        default="refuse", metadata={"help": "Padding rows that differ.", "choices": ["refuse", "truncate"]}
    )
    loss_backend: str = field(
        default="auto", metadata={"help": "How the loss is computed.", "choices": list(get_args(Backend))}
    )
    allow_new_weights: bool = field(
        default=False, metadata={"help": "Take a model with missing or unknown weights; missing ones start at random."}
    )
    scale_rewards: str = field(
        default="none", metadata={"help": "Divide advantages by a standard deviation: group, batch or none."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
    vllm_importance_sampling_correction: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "TRL's own correction for vLLM; by default only with anchor: old."}
    )

    # no cache knows samples that are yet to be drawn
    reference: str | None = field(default=None, init=False)
    reference_url: str | None = field(default=None, init=False)
    teacher_url: str | None = field(default=None, init=False)
    teacher_cache: str | None = field(default=None, init=False)
    reference_cache: str | None = field(default=None, init=False)
    cache_verify_key: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_numbers(self)
        for key in ("trust_region_kwargs", "target_kwargs"):
            if isinstance(value := getattr(self, key), str):
                setattr(self, key, json.loads(value))
            if not isinstance(getattr(self, key), dict | None):
                raise ConfigError(f"{key}={getattr(self, key)!r}; expected names and values, such as {{delta: 0.5}}")
        if self.kept_samples < 0:
            raise ConfigError(f"kept_samples: {self.kept_samples}; expected 0 (none) or more")
        if self.listed_outcomes < 1:
            raise ConfigError(f"listed_outcomes: {self.listed_outcomes}; expected at least 1")
        refuse_settings(self)
        if self.vllm_importance_sampling_correction is None:
            self.vllm_importance_sampling_correction = self.anchor == "old"
        self.build_target()
        refuse_advantages(self)
        use_new_names(self)
        super().__post_init__()
        pin_where_there_is_need(self)
        refuse_half_generations(self)

    @property
    def target_label(self) -> str:
        """The objective as records and tables name it."""
        return self.build_target().name

    def build_target(self) -> Target:
        """The objective that the keys name: a trust region, a target, or one beside the other.

        Raises:
            ConfigError: neither, or each in the other's place.
        """
        target = None if self.target is None else get_target(self.target, **(self.target_kwargs or {}))  # pyright: ignore[reportCallIssue]
        if isinstance(target, TrustRegion):
            raise ConfigError(f"target: {self.target} is a trust region; set it as trust_region: {self.target}")
        if target is not None and target.has_label_term:
            raise ConfigError(
                f"target: {self.target} pulls towards the observed token, and here that is a sample of any quality; expected a "
                "divergence to a teacher (reverse_kl, forward_kl, generalized_jsd, skew_kl, distillation)"
            )
        if self.trust_region is None:
            if target is None:
                raise ConfigError("neither trust_region nor target is set: nothing would be taught; set one of them")
            return target
        region = get_trust_region(self.trust_region, **(self.trust_region_kwargs or {}))  # pyright: ignore[reportCallIssue]
        if not isinstance(region, TrustRegion):
            raise ConfigError(
                f"trust_region: {self.trust_region} is no rule for samples; set it as target, or choose one (`qtarget targets`)"
            )
        if self.advantage == TAUGHT:
            return Taught(region)
        return region if target is None else Regularised(region, target, self.target_weight)

    @property
    def rewarded(self) -> bool:
        """Whether rewards are read at all."""
        return self.trust_region is not None and self.advantage != TAUGHT
