"""A run that learns nothing says so while it goes, once, with the ways out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

LINES, STEPS = 6, 30
"""Log lines and optimizer steps before anything is said; less would be noise, or a warm-up."""
FLAT = 0.02
"""Share of the nll by which the mean of the later half of the lines is below that of the earlier half, at most."""
TO_LEARN = 0.7
"""Nats a token below which a flat nll may be the end of learning: better than one in two."""
LIGHT, FEW = 0.05, 0.1
"""Mean label weight, and effective share of the tokens, near zero."""


class NotLearning(TrainerCallback):
    """Watches the training lines of the log.

    Args:
        target: as records name it.
        guarded: whether ``guard: true`` is set.

    Attributes:
        said: the message, once there was one.
    """

    def __init__(self, target: str, guarded: bool) -> None:
        self._target, self._guarded = target, guarded
        self._lines: list[dict[str, float]] = []
        self.said: list[str] = []

    def on_log(self, args: Any, state, control, logs=None, **kwargs) -> None:
        """Look at one line more."""
        if self.said or not logs or "loss" not in logs or "nll" not in logs or not state.is_world_process_zero:
            return
        self._lines.append(logs)
        if state.global_step < max(STEPS, 2 * args.get_warmup_steps(state.max_steps), 0.1 * state.max_steps):
            return
        found = finding(self._lines, self._target, self._guarded, state.global_step)
        if found:
            self.said.append(found)
            logger.warning(found)


def finding(lines: Sequence[dict[str, float]], target: str, guarded: bool, step: int) -> str | None:
    """What is wrong with a training of these log lines, or nothing.

    Args:
        lines: training lines so far: ``nll``, ``label_weight``, ``effective_sample_size``.
        step: the last one's.

    Example:
        >>> line = {"nll": 6.4, "label_weight": 0.01, "effective_sample_size": 0.05}
        >>> finding([line] * 6, "dft", False, 50).partition(":")[0]
        'not learning with target dft'
        >>> finding([line | {"nll": 6.4 - i} for i in range(6)], "dft", False, 50)
    """
    if len(lines) < LINES:
        return None
    half = len(lines) // 2
    first, last = (sum(line["nll"] for line in part) / len(part) for part in (lines[:half], lines[half:]))
    if last < TO_LEARN or first - last > FLAT * last:
        return None
    weight, effective = (
        sum(line[name] for line in lines[half:]) / (len(lines) - half)
        for name in ("label_weight", "effective_sample_size")
    )
    what = f"not learning with target {target}: after {step} steps the nll is {last:.2f} nats a token, as at the start"
    if weight > LIGHT and effective > FEW:
        return f"{what}, though labels weigh {weight:.2g}; try another learning_rate (ten times this one, then a third)"
    ways = ["target: consensus", *(["guard: true, where the target reads the frozen base"] if not guarded else [])]
    return (
        f"{what}: labels weigh {weight:.2g} on average, and {effective:.0%} of the tokens carry that weight. The target gives "
        f"labels that its model does not expect next to nothing; ways out: {', '.join(ways)}, or a higher learning_rate"
    )
