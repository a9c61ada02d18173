"""The training log on a terminal: a bar, and of each line what a user needs; the whole line is in the records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback

SHOWN = {
    "loss": "loss",
    "nll": "nll",
    "label_weight": "label weight",
    "effective_sample_size": "effective",
    "mean_token_accuracy": "accuracy",
    "aux_loss": "aux loss",
    "learning_rate": "rate",
}
SAMPLED = {
    "loss": "loss",
    "reward": "reward",
    "kl/start": "KL to start",
    "divergence/kl_k3": "KL to sampler",
    "region/blocked": "blocked",
    "completions/mean_length": "length",
}
"""The same of a run on its own samples; TRL tells reward and length on steps that sample alone."""
DIVERGENCES, ROUNDING = ("kl/start", "divergence/kl_k3"), 1e-6
"""Nats a token below which a divergence is rounding."""


def print_short_lines(trainer: Any) -> None:
    """Put short lines in the place of the dicts that transformers prints."""
    for theirs, ours in ((ProgressCallback, ShortLines), (PrinterCallback, ShortPrints)):
        if trainer.pop_callback(theirs) is not None:
            trainer.add_callback(ours)


class ShortLines(ProgressCallback):
    """Transformers' bar with short lines."""

    def on_log(self, args: Any, state, control, logs=None, **kwargs) -> None:
        """One line; none for the run's own summary, which `qtarget train` prints as a table."""
        text = short_line(logs or {}, state.global_step)
        if text and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(text)


class ShortPrints(PrinterCallback):
    """The same where bars are off (``disable_tqdm``)."""

    def on_log(self, args: Any, state, control, logs=None, **kwargs) -> None:
        """One line."""
        text = short_line(logs or {}, state.global_step)
        if text and state.is_local_process_zero:
            print(text, flush=True)


def short_line(logs: Mapping[str, Any], step: int) -> str:
    """What a user needs of a log line.

    Example:
        >>> short_line({"loss": 2.0, "nll": 2.5, "grad_norm": 1.0, "label_weight": 0.5, "epoch": 0.25}, 10)
        'step 10: loss 2, nll 2.5, label weight 0.5'
        >>> short_line({"eval_loss": 2.0, "eval_nll": 2.5, "eval_runtime": 1.0}, 10)
        'step 10, eval: loss 2, nll 2.5'
        >>> short_line({"loss": 0.125, "reward": 0.5, "region/blocked": 0.0, "rollout/unscored_tokens": 0.0}, 3)
        'step 3: loss 0.125, reward 0.5, blocked 0'
    """
    prefix = next((key.removesuffix("loss") for key in logs if key.startswith("eval_") and key.endswith("loss")), "")
    shown = SAMPLED if prefix + "rollout/unscored_tokens" in logs else SHOWN
    values = {key: logs.get(prefix + key) for key in shown}
    found = [f"{name} {without_noise(key, values[key]):.4g}" for key, name in shown.items() if _is_number(values[key])]
    return f"step {step}{', ' + prefix.rstrip('_') if prefix else ''}: {', '.join(found)}" if found else ""


def without_noise(key: str, value: Any) -> Any:
    """A divergence below what float32 log-probs can tell is 0.

    Example:
        >>> without_noise("divergence/kl_k3", 8.377e-14), without_noise("kl/start", 2e-6), without_noise("loss", 1e-9)
        (0.0, 2e-06, 1e-09)
    """
    return 0.0 if key in DIVERGENCES and abs(value) < ROUNDING else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
