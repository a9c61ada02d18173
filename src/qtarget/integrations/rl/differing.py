"""A run whose rewards never differ within a group says so: every advantage is 0, and nothing is learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)

LINES = 3
"""Training lines of the log before anything is said."""
SHOWN = 200
"""Characters of a completion that are shown."""


class NoDifference(TrainerCallback):
    """Looks at the rewards of what is sampled, until those of one group differ; says so once early, and at the end.

    Args:
        taught: whether a target teaches beside the rewards.

    Attributes:
        said: the messages.
    """

    def __init__(self, taught: bool) -> None:
        self._taught, self._differed, self._samples, self._lines = taught, False, 0, 0
        self._example: tuple[str, dict[str, float]] = ("", {})
        self.said: list[str] = []

    def on_train_begin(self, args: Any, state, control, **kwargs) -> None:
        """A run that goes on remembers what its log says of the samples before."""
        self._differed |= any(line.get("frac_reward_zero_std", 1.0) < 1 for line in state.log_history)

    def saw(self, rewards: Mapping[str, Sequence[float | None]], completions: Sequence[Any], group: int) -> None:
        """Look at samples of all processes, those of a group in a row.

        Args:
            rewards: of each function, a number a sample; None or NaN where it scored none, which counts as 0.
            group: samples of one prompt.
        """
        if self._differed or not rewards:
            return
        plain = {name: [_number(value) for value in values] for name, values in rewards.items()}
        self._differed = any(differs(values, group) for values in plain.values())
        self._samples += len(completions)
        self._example = (shown_text(completions[-1]), {name: values[-1] for name, values in plain.items()})

    def on_log(self, args: Any, state, control, logs=None, **kwargs) -> None:
        """Say it once, after a few lines."""
        if "loss" in (logs or {}):
            self._lines += 1
            if self._lines == LINES and state.global_step < state.max_steps:
                self._say("so far", state)

    def on_train_end(self, args: Any, state, control, **kwargs) -> None:
        """Say it of the whole run."""
        self._say("in the whole run", state)

    def _say(self, when: str, state: Any) -> None:
        if self._differed or not self._samples or not state.is_world_process_zero:
            return
        text, rewards = self._example
        earned = ", ".join(f"{name} = {value:g}" for name, value in rewards.items())
        what = "the rewards taught nothing" if self._taught else "nothing was learned"
        self.said.append(
            f"no group had differing rewards {when} ({self._samples} samples), so {what}: an advantage is a reward less the "
            f"group's mean. One completion: {text!r} earned {earned}. Check that the reward finds the answer in such a text, that "
            "max_completion_length leaves room for one, that the prompts are neither too hard nor too easy for the model; a "
            "larger num_generations or temperature makes samples differ more"
        )
        logger.warning(self.said[-1])


def differs(values: Sequence[float], group: int) -> bool:
    """Whether the values of some group are not all the same.

    Example:
        >>> differs([0.0, 0.0, 1.0, 1.0], 2), differs([0.0, 1.0, 1.0, 1.0], 2)
        (False, True)
    """
    return any(len(set(values[i : i + group])) > 1 for i in range(0, len(values), group))


def newest(logs: Mapping[str, Any], names: Sequence[str], count: int) -> tuple[dict[str, list[Any]], list[Any]]:
    """Rewards by function, and completions, of the newest ``count`` samples in TRL 1.16's ``_logs``."""

    def last(values: Any) -> list[Any]:
        return list(islice(values, max(len(values) - count, 0), None))

    return {name: last(logs["rewards"][name]) for name in names}, last(logs["completion"])


def shown_text(completion: Any) -> str:
    """A completion as one short text; of messages what they say.

    Example:
        >>> shown_text([{"role": "assistant", "content": "4"}]), len(shown_text("a" * 1000))
        ('4', 203)
    """
    if isinstance(completion, list):
        completion = "\n".join(str(message.get("content") or "") for message in completion)
    text = str(completion)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _number(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else float(value)
