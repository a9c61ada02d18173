"""TRL's ``SFTConfig`` with the keys of the target and of frozen models."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_args

from transformers import TrainingArguments
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig

from qtarget.composed.guarded import Guarded
from qtarget.core.errors import ConfigError
from qtarget.core.types import Target, WeightsScale
from qtarget.data.limits import Limits
from qtarget.filtering.decision import Filter
from qtarget.integrations.shared.loss_keys import check_loss_keys
from qtarget.integrations.shared.numbers import check_numbers
from qtarget.integrations.shared.teacher import place_frozen
from qtarget.integrations.shared.warned import pin_where_there_is_need, use_new_names
from qtarget.loss.backends import Backend
from qtarget.registry import get_target

logger = logging.get_logger(__name__)


@dataclass
class QTargetConfig(SFTConfig):
    """TRL's ``SFTConfig`` plus the choice of target.

    Args:
        target: name (``qtarget targets`` lists them), ``weight+base``, or ``package.module:Class``.
        target_kwargs: its hyper-parameters.
        guard: give labels their weight back where the rows agree against the frozen model (``qtarget.Guarded``).
        reference: the frozen base: ``live`` (the model itself, run at each step), a cache folder, a model, or the URL of a
            scoring server. Absent or ``auto``: `qtarget train` scores the model once, where the target needs it, beside
            ``output_dir``.
        teacher: a cache folder, a model (folder or hub name; run live), or the URL of a scoring server, which `qtarget train`
            asks once, into ``output_dir/teacher_cache``.
        witness: folder written by ``qtarget score --crossfit``: copies of the base that judged rows they had not seen; for
            targets that ask it (``crossfit_consensus``).
        cache_verify_key: key file; caches must be signed with it (``qtarget cache sign``), and are refused else.
        reference_cache, reference_model_name_or_path, teacher_cache, teacher_model_name_or_path: what ``reference`` and
            ``teacher`` are read as; beside a cache or a URL the model says whose numbers they are.
        reference_top_k: log-probs a token that `qtarget train` keeps of the base.
        teacher_top_k: log-probs a token that a URL's teacher is asked for.
        vocab_padding: what to do where teacher and model differ in padding rows of the vocabulary: ``refuse``, or
            ``truncate`` both to the shorter (see ``qtarget.scoring.vocabulary.shared_vocab``).
        weights_scale: what the data's weights multiply: ``all`` that a token teaches (weight 0 is a mask), or ``label``, the
            pull towards the observed token alone.
        prompt_weight: train what completion_only_loss or assistant_only_loss masks too, at this weight (arXiv 2507.07817).
        unplaced_spans: what to do with rows whose ``weight_spans`` cannot be found in their tokens: ``refuse`` to train, or
            ``leave_out`` the rows.
        loss_backend: how the loss is computed, as in ``qtarget.linear_target_loss``; ``compiled`` fuses what a live
            teacher needs.
        filter: leave out rows that look bad (`qtarget.filtering`): ``none``, ``auto`` where the base's numbers show two kinds of
            rows, another rule of ``qtarget.filtering.RULES``, or a mapping ``{rule: surprise, keep: 0.6, as: weight}``. Needs a
            ``reference_cache``, whatever the target.
        group_by: column whose values are judged apart, as ``source``; or ``language``, which is detected where there is no such
            column. Absent: the first of ``source``, ``dataset``, ``category``, ``skill`` and ``role`` that the rows have.
        allow_new_weights: train a model whose checkpoint lacks weights of its architecture, or has others; refused without.
        limits: how much is taken, where more than usual is right: ``{rows: 20000000}`` (``qtarget.data.limits.Limits``).
        heatmap_rows: evaluation rows whose tokens are recorded at each evaluation and sent to trackers as pictures; 0: none.
    """

    target: str = field(default="sft", metadata={"help": "What distribution each token is pulled towards."})
    target_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyper-parameters of the target, as a mapping or a JSON string."}
    )
    guard: bool = field(default=False, metadata={"help": "Guard the target against a flawed prior."})
    reference: str | None = field(
        default=None, metadata={"help": "The frozen base: live, a cache folder, a model, or a scoring server's URL."}
    )
    reference_cache: str | None = field(default=None, metadata={"help": "Folder written by `qtarget score`."})
    teacher_cache: str | None = field(default=None, metadata={"help": "Folder written by `qtarget score`."})
    witness: str | None = field(default=None, metadata={"help": "Folder written by `qtarget score --crossfit`."})
    cache_verify_key: str | None = field(
        default=None, metadata={"help": "Key file: caches must be signed with it (`qtarget cache sign`)."}
    )
    reference_model_name_or_path: str | None = field(default=None, metadata={"help": "Frozen base, scored live."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher, scored live."})
    teacher: str | None = field(default=None, metadata={"help": "A cache folder, a model, or a scoring server's URL."})
    reference_top_k: int = field(default=32, metadata={"help": "Log-probs a token, of a base that train scores."})
    teacher_top_k: int = field(default=32, metadata={"help": "Log-probs a token, of a teacher behind a URL."})
    vocab_padding: str = field(
        default="refuse", metadata={"help": "Padding rows that differ.", "choices": ["refuse", "truncate"]}
    )
    weights_scale: str = field(
        default="all", metadata={"help": "What the data's weights multiply.", "choices": list(get_args(WeightsScale))}
    )
    prompt_weight: float | None = field(default=None, metadata={"help": "Train prompt tokens too, at this weight."})
    unplaced_spans: str = field(
        default="refuse",
        metadata={"help": "Rows whose weight_spans are not found in their tokens.", "choices": ["refuse", "leave_out"]},
    )
    filter: dict[str, Any] | str | None = field(
        default="none", metadata={"help": "Rows to leave out: none, auto, a rule, or {rule, keep, as}."}
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Column whose values are judged apart; or language, which is detected."}
    )
    loss_backend: str = field(
        default="auto", metadata={"help": "How the loss is computed.", "choices": list(get_args(Backend))}
    )
    allow_new_weights: bool = field(
        default=False, metadata={"help": "Take a model with missing or unknown weights; missing ones start at random."}
    )
    limits: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Limits on rows, files and templates to raise, as a mapping or a JSON string."}
    )
    heatmap_rows: int = field(default=4, metadata={"help": "Evaluation rows shown token by token; 0 for none."})

    @classmethod
    def from_trl(cls, args: TrainingArguments) -> QTargetConfig:
        """The same settings with ``target="sft"``; TRL's ``loss_type="dft"`` becomes ``target="dft"``.

        Values are taken over as they are: nothing is parsed, resolved or set up a second time.

        Args:
            args: ``SFTConfig``, or ``TrainingArguments``, to which TRL's own defaults are added as TRL does.

        Raises:
            ConfigError: settings that choose a loss which no target is.

        Example:
            >>> import tempfile
            >>> args = SFTConfig(tempfile.mkdtemp(), learning_rate=1e-3, bf16=False, report_to="none")
            >>> own = QTargetConfig.from_trl(args)
            >>> own.target, own.learning_rate
            ('sft', 0.001)
        """
        own = object.__new__(cls)
        for f in fields(cls):
            vars(own)[f.name] = f.default if f.default_factory is MISSING else f.default_factory()
        vars(own).update(vars(args))
        check_numbers(own)
        if own.pad_to_multiple_of == "auto":  # TrainingArguments: SFTConfig resolves it as it is made
            own.pad_to_multiple_of = 128 if args.device.type == "neuron" else None
        if own.loss_type == "dft":
            own.target, own.loss_type = "dft", "nll"
            logger.warning("loss_type 'dft' of TRL is target 'dft' here")
        own._place_target()
        return own

    def __post_init__(self) -> None:
        check_numbers(self)
        use_new_names(self)
        super().__post_init__()
        self._place_target()

    def _place_target(self) -> None:
        self.reference_url, self.teacher_url = (place_frozen(self, role) for role in ("reference", "teacher"))
        pin_where_there_is_need(self)
        if isinstance(self.target_kwargs, str):
            self.target_kwargs = json.loads(self.target_kwargs)
        if not isinstance(self.target_kwargs, dict | None):
            raise ConfigError(
                f"target_kwargs={self.target_kwargs!r}; expected names and values, such as {{alpha: 0.5}}"
            )
        if isinstance(self.limits, str):
            self.limits = json.loads(self.limits)
        Limits.of(self.limits)
        check_loss_keys(self)
        if self.loss_backend not in get_args(Backend):
            raise ConfigError(f"loss_backend={self.loss_backend!r}; expected one of {', '.join(get_args(Backend))}")
        if self.weights_scale not in get_args(WeightsScale):
            raise ConfigError(
                f"weights_scale={self.weights_scale!r}; expected one of {', '.join(get_args(WeightsScale))}"
            )
        if Filter.of(self.filter):
            refuse_prompts(self.prompt_weight)
        if self.unplaced_spans not in ("refuse", "leave_out"):
            raise ConfigError(f"unplaced_spans={self.unplaced_spans!r}; expected refuse or leave_out")

    @property
    def target_label(self) -> str:
        """The target as records and tables name it."""
        return f"guarded {self.target}" if self.guard else self.target

    def build_target(self) -> Target:
        """The target that ``target``, ``target_kwargs`` and ``guard`` name."""
        target = get_target(self.target, **(self.target_kwargs or {}))  # pyright: ignore[reportCallIssue]
        if target.needs.advantages:
            raise ConfigError(
                f"target: {self.target} is a rule for samples and their advantages, and these rows are demonstrations; set it as "
                f"trust_region: {self.target} in `qtarget rl`, or choose another target"
            )
        return Guarded(target) if self.guard else target


def refuse_prompts(prompt_weight: float | None) -> None:
    """A filter and ``prompt_weight`` exclude each other.

    Raises:
        ConfigError: prompts are trained.
    """
    if prompt_weight is not None:
        raise ConfigError("filter judges answers, and prompt_weight trains prompts too; leave one of them out")
