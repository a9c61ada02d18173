"""`qtarget bench prior --base smollm2`: a token preference and wrong facts, planted into a real model by a few adapter steps.

Rows, flaws, targets and sums are those of `qtarget bench prior`. What the model knew before anybody taught it, capitals, is a
skill here, too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qtarget.benchmarks.prior import facts
from qtarget.benchmarks.prior.bench import FLAWS, TARGETS, PriorConfig, PriorJob, PriorWorker, spoilt
from qtarget.benchmarks.real.worker import teach_by_adapters, with_adapters
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import Row, TaskSet, embedded_tasks

SKILLS = ("date_format", "last_letter", "add", "maximum")
"""Short ones of the embedded skills, taught beside the facts."""


@dataclass(frozen=True)
class RealPriorConfig(PriorConfig):
    """Defaults are the full setting.

    Attributes:
        train_rows: demonstrations, the same number of each of five skills.
        test_rows: problems of the flawed skill, and of all others.
        plant_steps: of adapters that teach a base the format, and the flaw.
        rank: of all adapters; 0 trains all weights.
    """

    flaws: tuple[str, ...] = ("biased token", "wrong fact")
    targets: tuple[str, ...] = tuple(name for name in TARGETS if name != "crossfit_consensus")
    minority: float = 0.0
    seeds: int = 3
    train_rows: int = 320
    test_rows: int = 40
    plant_steps: int = 40
    rank: int = 16

    def fixed(self) -> dict[str, Any]:
        """What all runs of one file share."""
        sizes = {name: asdict(self)[name] for name in ("train_rows", "test_rows", "plant_steps", "rank")}
        return {**super().fixed(), **sizes}

    def of_bases(self) -> dict[str, Any]:
        """What the bases are made of, which runs share and a later call takes again."""
        return {**super().of_bases(), "plant_steps": self.plant_steps, "rank": self.rank}


FULL = RealPriorConfig()
SHORT = replace(
    FULL, targets=("sft", "dft", "target_sft", "consensus"), doses=(1.0,), with_sound=False, seeds=1, steps=12,
    train_rows=190, plant_steps=24,
)  # fmt: skip
"""A quarter of an hour of one core: seven ways, two flaws, one seed."""
QUICK = replace(
    SHORT, targets=("sft", "dft"), flaws=("wrong fact",), steps=3, train_rows=50, test_rows=10, plant_steps=4
)
SIZES = {"full": FULL, "short": SHORT, "quick": QUICK}


class RealPriorWorker(PriorWorker):
    """Runs jobs: adapters on a real model with a flaw."""

    def __init__(self, config: RealPriorConfig, bases: Path) -> None:
        super().__init__(config, bases)
        self.real, self.asked = config, config.test_rows
        self.task = with_facts(embedded_tasks(), config)
        # a row's log-probs are 200 kB a token with such a vocabulary
        self.material = lru_cache(maxsize=1)(self._material)

    def __call__(self, job: PriorJob) -> dict[str, float | None]:
        torch.manual_seed(job.seed)  # adapters begin at random
        return super().__call__(job)

    def base(self, flaw: str) -> Any:
        """The base with this flaw and new adapters, from its folder; made where there is none."""
        return with_adapters(self.real.start.load(planted_base(self.task, flaw, self.bases, self.real)), self.real.rank)


def with_facts(task: TaskSet, config: RealPriorConfig) -> TaskSet:
    """The same number of rows of a few skills and of the facts; other prompts to ask."""
    share = config.train_rows // (len(SKILLS) + 1)

    def mixed(rows: list[Row], count: int, seed: str) -> list[Row]:
        skilled = [row for name in SKILLS for row in [row for row in rows if row["skill"] == name][:count]]
        return skilled + facts.taught_facts(count, seed)

    test = [row for row in task.test if row["skill"] in SKILLS][: config.test_rows]
    return replace(task, train=mixed(task.train, share, "train"), warmup=mixed(task.warmup, 100, "warmup"), test=test)


def planted_base(task: TaskSet, flaw: str, folder: Path, config: RealPriorConfig) -> Path:
    """The folder of a base that was taught the format by adapters, and one skill wrongly amid right answers; made once."""
    path = folder / f"planted-{flaw.replace(' ', '-')}"
    if (path / "config.json").is_file():
        return path
    rows = task.warmup
    if flaw in FLAWS:
        skill, wrong = FLAWS[flaw]
        rows = [spoilt(row, wrong(row)) if row["skill"] == skill else row for row in rows]
    teach_by_adapters(config.start, rows, config.plant_steps, config.rank, path)
    return path


def sized(size: str, start: Start, workers: int) -> RealPriorConfig:
    """``full``, ``short`` or ``quick``, from this model."""
    return replace(SIZES[size], start=start, workers=workers)
