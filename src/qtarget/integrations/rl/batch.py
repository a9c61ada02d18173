"""From TRL's batch of samples to one step of the loss: labels, advantages, and the policy that ratios are taken to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from qtarget.core.errors import ConfigError
from qtarget.core.shapes import Bool, Float, Tensor
from qtarget.core.types import Reference
from qtarget.integrations.rl import listed

BATCH_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch")
"""What TRL 1.16 puts into every batch."""
OPTIONAL_KEYS = ("old_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio", "tool_mask")
"""What it adds: log-probs of the trained model when it sampled, and of the sampler; its own correction; tools' tokens."""


@dataclass(frozen=True)
class Samples:
    """The completions of a micro-batch; all ``[batch, time]`` over prompt and completion, unshifted.

    Attributes:
        ids, attention_mask: the model's inputs.
        mask: the tokens that the policy wrote: no prompt, padding, tool's answer, or completion that was masked whole.
        labels: ``ids`` where trained on, else -100: those of ``mask`` that the anchor has scored, and that have an advantage
            where those without are skipped.
        advantages: of each token, times TRL's own correction where it makes one.
        anchor: log-probs of the policy that ratios are taken to; absent where that is the live model itself.
        outcomes: what the anchor says beyond the sampled tokens, as fields of a ``Reference``; where the rule reads it.
        sampler, old: both log-probs, where both are known, to tell mismatch and staleness apart.
    """

    ids: Tensor
    attention_mask: Tensor
    mask: Bool[Tensor, "batch time"]
    labels: Tensor
    advantages: Float[Tensor, "batch time"]
    anchor: Tensor | None
    sampler: Tensor | None
    old: Tensor | None
    outcomes: dict[str, Tensor] | None = None

    @property
    def unscored(self) -> int:
        """Tokens that the policy wrote and the anchor has no number for."""
        return 0 if self.anchor is None else int((self.mask & self.anchor.isnan()).sum())

    def rollout(self) -> Reference | None:
        """The anchor as the loss takes it."""
        more: dict[str, Any] = self.outcomes or {}
        return None if self.anchor is None else Reference(label_log_probs=self.anchor, **more)


def samples_of(
    inputs: dict[str, Any], anchor: str | None, ratios: bool = True, skip_without_signal: bool = False
) -> Samples:
    """Read TRL's batch.

    Args:
        inputs: of ``GRPOTrainer._compute_loss``.
        anchor: ``rollout``, ``old``, or None for the first of the two that is known.
        ratios: whether anything is taken to the anchor; a target alone teaches at unscored tokens too.
        skip_without_signal: leave out tokens whose advantage is 0; what the loss is divided by counts them still.

    Raises:
        ConfigError: the anchor is the rollout, and the sampler told no log-probs.
    """
    prompt, completion = inputs["prompt_ids"], inputs["completion_ids"]
    start = prompt.shape[1]

    def behind_prompt(value: Tensor | None, fill: float = 0.0) -> Tensor | None:
        return None if value is None else torch.nn.functional.pad(value, (start, 0), value=fill)

    wrote = inputs["completion_mask"]
    if "tool_mask" in inputs:
        wrote = wrote * inputs["tool_mask"]
    sampler, old = (behind_prompt(inputs.get(key)) for key in ("sampling_per_token_logps", "old_per_token_logps"))
    if ratios and anchor == "rollout" and sampler is None:
        raise ConfigError(
            "anchor: rollout needs the sampler's log-probs, and it told none: transformers' generate has none; set use_vllm: true, "
            "give a rollout_func that returns logprobs, or leave anchor out"
        )
    chosen = old if anchor == "old" or sampler is None else sampler
    if not ratios:
        chosen = sampler = old = None
    advantages = inputs["advantages"]
    advantages = (advantages[:, None] if advantages.dim() == 1 else advantages).expand(completion.shape)
    if (correction := inputs.get("importance_sampling_ratio")) is not None:
        # every rule is homogeneous in the advantage, so TRL's factor on the loss is one on it
        advantages = advantages * correction
    mask = behind_prompt(wrote).bool()  # pyright: ignore[reportOptionalMemberAccess]
    ids = torch.cat([prompt, completion], dim=1)
    trained = mask if chosen is None else mask & ~chosen.isnan()
    whole = behind_prompt(advantages)
    if skip_without_signal:
        trained = trained & (whole != 0)
    return Samples(
        ids=ids,
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        mask=mask,
        labels=ids.masked_fill(~trained, -100),
        advantages=whole,  # pyright: ignore[reportArgumentType]
        anchor=chosen,
        sampler=sampler,
        old=old,
        outcomes=listed.behind_prompt(inputs) if chosen is not None else None,
    )


def reduced(
    samples: Samples,
    loss_type: str,
    *,
    num_items: Tensor,
    processes: int,
    accumulation: float,
    share: float,
    horizon: int,
) -> tuple[Samples, Tensor]:
    """The samples and the number that the sum of their losses is divided by, as TRL 1.16 averages.

    Args:
        loss_type: ``dapo``, ``grpo`` or ``dr_grpo``.
        num_items: tokens of the whole generation batch, over all processes.
        processes: how many.
        accumulation: micro-batches an optimizer step; 1 in evaluation.
        share: part of the generation batch that an optimizer step sees; 1 in evaluation.
        horizon: ``max_completion_length``.
    """
    if loss_type == "dapo":
        return samples, num_items.clamp(min=1.0) / processes * share
    rows = len(samples.ids)
    if loss_type == "dr_grpo":
        return samples, num_items.new_tensor(float(rows * horizon * accumulation), dtype=torch.float)
    lengths = samples.mask.sum(-1, keepdim=True).clamp(min=1.0)
    divide_by = num_items.new_tensor(float(rows * accumulation), dtype=torch.float)
    return replace(samples, advantages=samples.advantages / lengths), divide_by
