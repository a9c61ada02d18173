"""What is run: contenders, training runs by name, and how a run says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BASELINE = "sft"
TUNING_SEED = 1000
"""Beyond the seeds of the final runs: nothing is tuned on their luck."""

Kind = Literal["base", "tune", "final"]


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: in the table.
        overrides: keys of the config that are its own.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def filtered(self) -> bool:
        """Whether rows are left out before training."""
        return self.overrides.get("filter") not in (None, "none")


@dataclass(frozen=True)
class Job:
    """One run. ``base`` trains nothing: the untrained model is measured.

    Attributes:
        contender: its name; of the base, the baseline's, for what its rows become.
        rate: the learning rate.
        steps: of the optimizer, equal for all; -1 for the base, which finds out how many the config asks for.
    """

    kind: Kind
    contender: str
    rate: float = 0.0
    seed: int = 0
    steps: int = -1

    @property
    def key(self) -> str:
        """Names the run in the file of finished runs."""
        return "base" if self.kind == "base" else f"{self.contender}|{self.rate:g}|{self.seed}"

    @property
    def words(self) -> str:
        """For a line of progress."""
        if self.kind == "base":
            return "the untrained base"
        return f"{self.contender}, rate {self.rate:g}, {'tuning' if self.kind == 'tune' else f'seed {self.seed}'}"


Result = Mapping[str, Any]
"""Of a job, JSON: ``steps``, ``seconds``, ``cpu_seconds``, ``memory_bytes``, ``curve``, ``validation``, and of each set in
``sets`` ``nll`` (nats and tokens a row) and ``scores`` (a share a row, or None where nothing is completed)."""
