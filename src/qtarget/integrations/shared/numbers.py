"""The numbers of a training configuration, and what each of them may be: one table, checked before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qtarget.core.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value; ``beyond``: both are left out; ``either``: a value that is right all the same."""

    low: float
    high: float = math.inf
    beyond: bool = False
    either: float | None = None

    def allow(self, value: float) -> bool:
        """Whether ``value`` is a number within the bounds; NaN never is, infinity only where nothing forbids it."""
        if self.either is not None and value == self.either:
            return True
        inside = self.low < value < self.high if self.beyond else self.low <= value <= self.high
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        least = f"more than {self.low:g}" if self.beyond else f"at least {self.low:g}"
        most = "" if self.high == math.inf else f" and {'less than' if self.beyond else 'at most'} {self.high:g}"
        return least + most + ("" if self.either is None else f", or {self.either:g}")


COUNT, SOME, SHARE, POSITIVE = Bounds(0), Bounds(1), Bounds(0, 1), Bounds(0, beyond=True)
CONSTRAINTS: dict[str, Bounds] = {
    "learning_rate": COUNT,
    "weight_decay": COUNT,
    "max_grad_norm": COUNT,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": Bounds(1, either=-1),
    "warmup_steps": COUNT,
    "per_device_train_batch_size": SOME,
    "per_device_eval_batch_size": SOME,
    "gradient_accumulation_steps": SOME,
    "eval_accumulation_steps": SOME,
    "max_length": Bounds(2),
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_total_limit": SOME,
    "seed": COUNT,
    "data_seed": COUNT,
    "dataloader_num_workers": COUNT,
    "dataloader_prefetch_factor": SOME,
    "dataset_num_proc": SOME,
    "pad_to_multiple_of": SOME,
    "neftune_noise_alpha": COUNT,
    "router_aux_loss_coef": COUNT,
    "prompt_weight": COUNT,
    "reference_top_k": SOME,
    "teacher_top_k": SOME,
    "heatmap_rows": COUNT,
    "lora_r": SOME,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
}
"""Keys of TRL's, transformers' and our configs; what a value outside would do there is a late traceback, or silence."""


def check_numbers(config: Any) -> None:
    """Refuse numbers that make no sense, all in one error.

    Raises:
        ConfigError: names each key, its value and what was expected.

    Example:
        >>> from types import SimpleNamespace
        >>> check_numbers(SimpleNamespace(learning_rate=float("nan"), max_steps=-1))
        Traceback (most recent call last):
        ...
        qtarget.core.errors.ConfigError: learning_rate is nan, expected at least 0
    """
    wrong = []
    for key, bounds in CONSTRAINTS.items():
        value = getattr(config, key, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and not bounds.allow(value):
            wrong.append(f"{key} is {value:g}, expected {bounds}")
    if wrong:
        raise ConfigError("; ".join(wrong))
