"""How the copies of a cross-fit are trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from qtarget.core.errors import ConfigError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.preparation import changed


@dataclass(frozen=True)
class CrossfitRecipe:
    """How the copies are trained; all else (batch, optimizer, schedule, dtype, length) is the config's.

    Attributes:
        folds: copies, each of which judges its share of the rows and is trained on the others.
        steps: optimizer steps of each; absent: twice over its rows.
        learning_rate: the peak.
        rank: of LoRA on all linear layers, alpha twice that; 0 trains all weights.
        prompts: whether each answer is asked under other rows' prompts, too: six more passes of a copy over its rows.

    Raises:
        ConfigError: a number that makes no sense.
    """

    folds: int = 2
    steps: int | None = None
    learning_rate: float = 5e-4
    rank: int = 16
    prompts: bool = True

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(
                f"crossfit {self.folds}; expected at least 2 folds: a copy judges what it was not trained on"
            )
        if (self.steps is not None and self.steps < 1) or not 0 < self.learning_rate < float("inf") or self.rank < 0:
            raise ConfigError(
                f"a copy of {self.steps} steps, rate {self.learning_rate}, rank {self.rank}; expected at least 1 step, a "
                "positive rate and a rank of 0 (all weights) or more"
            )


def stated(recipe: CrossfitRecipe, args: QTargetConfig) -> dict[str, Any]:
    """A recipe in full: its own numbers, and those of the config that a copy is trained with."""
    own = {name: value for name, value in asdict(recipe).items() if name not in ("folds", "prompts")}
    return own | {
        "passes": 2 if recipe.steps is None else None,
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "target": "sft",
    }


def copy_settings(args: QTargetConfig, recipe: CrossfitRecipe, rows: int, folder: Path) -> QTargetConfig:
    """The config with which a copy is trained: plain SFT, nothing saved, evaluated or reported."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return changed(
        args, target="sft", filter="none", target_kwargs=None, guard=False, weights_scale="label", packing=False,
        eval_packing=False, padding_free=False, reference_cache=None, teacher_cache=None, reference_model_name_or_path=None,
        teacher_model_name_or_path=None, witness=None, reference=None, teacher=None,
        output_dir=str(folder), max_steps=recipe.steps or ceil(2 * rows / batch),
        learning_rate=recipe.learning_rate, save_strategy=SaveStrategy.NO, eval_strategy=IntervalStrategy.NO,
        logging_strategy=IntervalStrategy.NO, load_best_model_at_end=False, push_to_hub=False, report_to=[],
        disable_tqdm=True, resume_from_checkpoint=None,
    )  # fmt: skip
