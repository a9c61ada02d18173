"""What is run: contenders, training runs by name, and how a run says what it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TUNING_SEED = 1000
"""Beyond the seeds of the final runs: nothing is tuned on their luck."""
LOOKS, CURVE = 4, 20
"""Evaluations on the validation rows during a final run, and points of its training curve."""

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


def contender_of(key: str) -> str:
    """The contender whose run has this key; of the base's, ``base``.

    Example:
        >>> contender_of(Job("tune", "a|b", 0.001, 3).key)
        'a|b'
    """
    return key.rsplit("|", 2)[0]


Result = Mapping[str, Any]
"""Of a job, JSON: ``steps``, ``seconds``, ``cpu_seconds``, ``memory_bytes``, ``curve``, ``validation``, and of each set in
``sets`` ``nll`` (nats and tokens a row) and ``scores`` (a share a row, None for one whose answer has weight 0; or None where
nothing is completed)."""


def run_keys(job: Job, output: Path) -> dict[str, Any]:
    """Keys of the config that a comparison sets for every run: nothing is saved or sent anywhere.

    Args:
        output: a folder that is thrown away.
    """
    looks = job.kind == "final"
    return {
        "output_dir": str(output),
        "seed": job.seed,
        "data_seed": None,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "report_to": [],
        "heatmap_rows": 0,
        "disable_tqdm": True,
        "logging_strategy": "steps",
        "logging_steps": float(max(1, job.steps // CURVE)),
        "logging_first_step": True,
        "eval_strategy": "steps" if looks else "no",
        "eval_steps": float(max(1, job.steps // LOOKS)),
        "eval_on_start": False,
        "resume": False,
        "resume_from_checkpoint": None,
    } | ({} if job.kind == "base" else {"learning_rate": job.rate, "max_steps": job.steps})


def fixed_keys() -> frozenset[str]:
    """Keys that are alike in all runs, or that a comparison chooses: no contender has any of its own."""
    return frozenset(run_keys(Job("final", ""), Path())) | {"num_train_epochs", "model_name_or_path", "model_revision"}
