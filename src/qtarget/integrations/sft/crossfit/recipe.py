"""How the copies of a cross-fit are trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from qtarget.core.errors import ConfigError
from qtarget.data.crossfit.steps import default_steps, stated_steps
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.preparation import changed


@dataclass(frozen=True)
class CrossfitRecipe:
    """How the copies are trained; all else (batch, optimizer, schedule, dtype, length) is the config's.

    Attributes:
        folds: copies, each of which judges its share of the rows and is trained on the others.
        steps: optimizer steps of each; absent: twice over its rows, and more where these are few
            (``qtarget.data.crossfit.steps.default_steps``).
        learning_rate: the peak.
        rank: of LoRA on all linear layers, alpha twice that; 0 trains all weights.
        prompts: whether each answer is asked under other rows' prompts, too: six more passes of a copy over its rows.

    Raises:
        ConfigError: a number that makes no sense.
    """

    folds: int = 2
    steps: int | None = None
    learning_rate: float = 1e-3
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


LEARNING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "average_tokens_across_devices", "bf16", "data_seed", "dataloader_drop_last",
    "fp16", "lr_scheduler_kwargs", "max_grad_norm", "neftune_noise_alpha", "optim_args",
    "optim_target_modules", "router_aux_loss_coef", "seed", "shuffle_dataset", "tf32", "train_sampling_strategy",
    "use_liger_kernel", "warmup_steps", "weight_decay",
)  # fmt: skip
"""Settings of a run, beside those that a recipe names, that decide what a copy learns of its rows."""
WARMUP = 0.1
"""Of a copy's steps, at most: a run's warm-up may be longer than a copy's whole training."""


def stated(recipe: CrossfitRecipe, args: QTargetConfig) -> dict[str, Any]:
    """A recipe in full: its own numbers, and those of the config that a copy is trained with."""
    return {
        **stated_steps(recipe.steps),
        "learning_rate": recipe.learning_rate,
        "rank": recipe.rank,
        "batch_size": batch_of(args),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "target": "sft",
        "settings": {name: _plain(getattr(args, name)) for name in LEARNING},
    }


def batch_of(args: QTargetConfig) -> int:
    """Rows a step of a copy: one process trains it."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    return json.loads(json.dumps(value, default=str))


def copy_settings(args: QTargetConfig, recipe: CrossfitRecipe, rows: int, folder: Path) -> QTargetConfig:
    """The config with which a copy is trained: plain SFT, nothing saved, evaluated or reported."""
    steps = recipe.steps or default_steps(rows, batch_of(args))
    warmup = args.warmup_steps if args.warmup_steps < 1 else min(args.warmup_steps, WARMUP * steps)
    return changed(
        args, target="sft", filter="none", target_kwargs=None, guard=False, weights_scale="label", packing=False,
        eval_packing=False, padding_free=False, reference_cache=None, teacher_cache=None, reference_model_name_or_path=None,
        teacher_model_name_or_path=None, witness=None, reference=None, teacher=None,
        output_dir=str(folder), max_steps=steps, warmup_steps=int(warmup) if warmup >= 1 else warmup,
        learning_rate=recipe.learning_rate, save_strategy=SaveStrategy.NO, eval_strategy=IntervalStrategy.NO,
        logging_strategy=IntervalStrategy.NO, load_best_model_at_end=False, push_to_hub=False, report_to=[],
        disable_tqdm=True, resume_from_checkpoint=None, eval_on_start=False, do_eval=False, auto_find_batch_size=False,
    )  # fmt: skip
