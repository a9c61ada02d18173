"""`qtarget bench noise`: which targets survive noise, by how much the base already knows.

The protocol, the same for every method: at each point of the map it tunes its learning rate, then its own
hyper-parameter, on noisy validation rows (judged by what those rows state), with a seed of their own. The chosen pair is
then run on ``seeds`` draws of noise and order, and only then are the clean test prompts asked. All runs have equal steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.methods import CHOSEN, OTHERS, PRACTICE, Method, methods
from qtarget.benchmarks.noise.results import summarize, untrained_key
from qtarget.benchmarks.noise.runs import Cell, Job, NoiseWorker, Setting
from qtarget.benchmarks.pool import (
    WORKERS,
    Progress,
    RunLog,
    Workers,
    check_settings,
    one_thread,
    quiet_libraries,
    save_results,
)
from qtarget.benchmarks.start import Start, claim
from qtarget.benchmarks.tasks import make_base, task_set
from qtarget.core.errors import ConfigError

# beyond the seeds of the final runs: nothing is tuned on their draws
TUNING_SEED = 1000
RANDOM = "random_tokens"
NAMES = (
    *(method.name for method in PRACTICE if method.rows != "marked rows" and not method.selects),
    *(method.name for method in CHOSEN),
    "crossfit_consensus",
)
"""On the whole map; what else there is stands at a few points (``FRESH``, ``CROSSFITTED``), or by name."""
CELLS = (
    *(Cell(base, RANDOM, rate) for base in ("none", "most") for rate in (0.0, 0.1, 0.2, 0.4)),
    *(Cell("half", RANDOM, rate) for rate in (0.0, 0.4)),
    *(Cell(base, "wrong_answer", 0.4) for base in ("none", "most")),
    *(Cell("most", kind, 0.4) for kind in ("contradictory_duplicate", "boilerplate", "cue")),
)
SCREEN = (Cell("none", RANDOM, 0.4), Cell("most", RANDOM, 0.4))


@dataclass(frozen=True)
class NoiseConfig:
    """Defaults are the full setting.

    Attributes:
        tasks, data: see `task_set`.
        cells: points of the map; rate 0 is there once, under the kind ``random_tokens``.
        names: methods that stand at every point.
        screen: points at which the remaining targets are run as well.
        seeds: draws of noise and order of the final runs.
        steps: optimizer steps of 16 rows.
        steps_grid: numbers of steps that every method tunes, at its best rate, before its own hyper-parameter; none: ``steps``.
        learning_rates: the grid, the first for the base that knows nothing; all methods share it.
        workers: processes of one thread.
        start: what the bases begin with.
        equal_compute: contenders that train no copies get as many steps more as copies cost the others.
    """

    tasks: str = "embedded"
    data: str | None = None
    cells: tuple[Cell, ...] = CELLS
    names: tuple[str, ...] = NAMES
    screen: tuple[Cell, ...] = SCREEN
    seeds: int = 5
    steps: int = 40
    steps_grid: tuple[int, ...] = ()
    learning_rates: tuple[float, ...] = (1e-3, 5e-4, 2e-3)
    workers: int = WORKERS
    start: Start = field(default_factory=Start)
    equal_compute: bool = False

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.workers, *self.steps_grid, 1) < 1:
            steps = (self.steps, *self.steps_grid)
            raise ConfigError(
                f"seeds {self.seeds}, steps {', '.join(map(str, steps))}, workers {self.workers}; expected at least 1 each"
            )
        methods(self.names)

    def methods_at(self, cell: Cell) -> list[Method]:
        """Those that mean something there."""
        found = list(methods(self.names))
        if cell in self.screen:
            found += [method for method in OTHERS if method.name not in self.names]
        if not cell.rate or cell.kind == "minority":  # nothing is marked
            return [method for method in found if method.rows not in ("marked", "marked rows")]
        return found

    def runs(self) -> int:
        """How many there are in all: learning rates, then the other values of the grid, then seeds."""
        found = [method for cell in dict.fromkeys((*self.cells, *self.screen)) for method in self.methods_at(cell)]
        rates, steps = _tried(len(self.learning_rates)), _tried(len(self.steps_grid))
        steps -= bool(rates and steps and self.steps in self.steps_grid)  # the run that chose the rate
        own = [_tried(len(method.grid)) - bool(rates + steps and len(method.grid) > 1) for method in found]
        return sum(rates + steps + values + self.seeds for values in own)


def _tried(values: int) -> int:
    """Runs that choose among so many: none where there is no choice."""
    return values if values > 1 else 0


SCAN = NoiseConfig(
    tasks="scan",
    cells=(
        *(Cell(base, RANDOM, rate) for base in ("none", "most") for rate in (0.0, 0.2, 0.4)),
        *(Cell(base, "wrong_answer", 0.4) for base in ("none", "most")),
    ),
    names=("sft", "consensus", "target_sft", "sft_kl", "dft", "prior_surprise"),
    screen=(),
)
"""Data on which no target of ours was designed."""
MATH = replace(
    SCAN,
    tasks="math",
    cells=tuple(Cell(base, RANDOM, rate) for base in ("most", "none") for rate in (0.4, 0.0)),
)
"""The same of real questions, which are three times as long."""
FRESH = NoiseConfig(
    cells=(
        *(Cell(base, kind, 0.4) for base in ("none", "most") for kind in ("wrong_answer", RANDOM)),
        Cell("most", RANDOM, 0.0), Cell("none", RANDOM, 0.0),
    ),
    names=(
        "sft", "sft, marked rows left out", "consensus", "crossfit_consensus", "sft, rows by witness",
        "sft, filtered rows", "sft, tail dropped", "sft, co-teaching",
    ),
    screen=(), seeds=2, learning_rates=(1e-3, 2e-3),
)  # fmt: skip
"""Data that nobody looked at before the rule stood."""
REAL = {
    "scan": SCAN,
    "math": MATH,
    "cogs": replace(FRESH, tasks="cogs"),
    "listops": replace(FRESH, tasks="listops"),
    "caesar": replace(FRESH, tasks="caesar"),
}
GPU = NoiseConfig(
    cells=tuple(Cell(base, RANDOM, rate) for base in ("none", "most") for rate in (0.0, 0.4)),
    names=("sft", "sft, filtered rows", "consensus", "target_sft", "sft_kl", "dft", "prior_surprise"),
    screen=(), seeds=3,
)  # fmt: skip
"""For a base of tens of millions of parameters."""
CROSSFITTED = NoiseConfig(
    cells=(
        *(Cell("none", kind, 0.4) for kind in (RANDOM, "wrong_answer")),
        Cell("most", RANDOM, 0.0), Cell("most", "wrong_answer", 0.4),
    ),
    names=(
        "sft", "sft, filtered rows", "consensus", "crossfit_consensus", "sft, rows by witness",
        "crossfit_consensus, rows by witness", "sft, marks left out", "sft, marked rows left out",
    ),
    screen=(), seeds=3, learning_rates=(1e-3, 2e-3),
)  # fmt: skip
"""Contenders that train copies first, at a few points, beside both oracles and the oldest practice."""
QUICK = NoiseConfig(
    cells=(Cell("most", RANDOM, 0.4),), names=("sft", "prior_surprise", "target_sft"), screen=(), seeds=1, steps=12,
    learning_rates=(1e-3,),
)  # fmt: skip
"""For continuous integration: enough to see an ordering with a wide margin, not for conclusions."""


def run_noise(config: NoiseConfig, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Run the map, cell by cell; results are saved after each.

    Args:
        output: JSON; finished runs stand beside it in ``.runs.jsonl``, bases in ``.bases``.
        resume: go on with the finished runs there.
        progress: called with runs done, runs in all, and what was done last.
    """
    same = ("tasks", "steps", "start", "equal_compute")
    check_settings(output, resume, {name: asdict(config)[name] for name in same})
    bases, total = output.with_suffix(".bases"), config.runs()
    data = Path(config.data) if config.data else None
    claim(bases, {"tasks": config.tasks, "start": asdict(config.start)})
    log = RunLog(output.with_suffix(".runs.jsonl"), resume)
    setting = Setting(config.tasks, data, bases, config.steps, config.start, config.equal_compute)
    with quiet_libraries(), one_thread():
        task = task_set(config.tasks, data)
        for base in dict.fromkeys(cell.base for cell in (*config.cells, *config.screen)):
            progress(len(log.runs), total, f"making the base that knows {base} of the format")
            make_base(task, base, bases, config.start)
        here = NoiseWorker(setting)
        untrained = untrained_accuracies(config, here)
    cells: list[dict[str, Any]] = []
    results = {
        "benchmark": "noise", "config": asdict(config), "untrained": untrained, "cells": cells,
        "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    with Workers(config.workers, NoiseWorker, setting) as workers:
        for cell in dict.fromkeys((*config.cells, *config.screen)):

            def done(job: Any, cell: Cell = cell) -> None:
                progress(len(log.runs), total, f"{cell.base}, {cell.kind} {cell.rate:g}: {job.method}")

            chosen = tuned(workers, log, cell, config, done)
            jobs = [replace(job, seed=seed, tuning=False) for job in chosen for seed in range(config.seeds)]
            found = workers.run(jobs, log, done)
            cells.append({**cell_results(cell, chosen, found, config.seeds), "base_knows": here.base_knows(cell)})
            results["summary"] = summarize(results)
            save_results(output, results)
    return results


def tuned(workers: Workers, log: RunLog, cell: Cell, config: NoiseConfig, done: Callable[[Any], None]) -> list[Job]:
    """For each method the best job on noisy validation rows: first over rates, then over steps, then over its own grid.

    Of equals the first of the grid is taken.
    """
    found = config.methods_at(cell)
    rates = [
        [Job(cell, method.name, rate, method.grid[0], TUNING_SEED, True) for rate in config.learning_rates]
        for method in found
    ]
    best = _best(workers, log, rates, done)
    if config.steps_grid:  # the default is the run that chose the rate
        grid = [None if steps == config.steps else steps for steps in config.steps_grid]
        best = _best(workers, log, [[replace(job, steps=steps) for steps in grid] for job in best], done)
    values = [[replace(job, value=value) for value in method.grid] for job, method in zip(best, found, strict=True)]
    return _best(workers, log, values, done)


def _best(workers: Workers, log: RunLog, groups: list[list[Job]], done: Callable[[Any], None]) -> list[Job]:
    scores = iter(workers.run([job for group in groups if len(group) > 1 for job in group], log, done))
    # minus i, so that of equals the first of the grid is the largest; where there is no choice nothing is run
    scored = [
        [(next(scores)["accuracy_percent"] if len(group) > 1 else 0.0, -i, job) for i, job in enumerate(group)]
        for group in groups
    ]
    return [max(group)[2] for group in scored]


def cell_results(cell: Cell, chosen: Sequence[Job], found: list[dict[str, Any]], seeds: int) -> dict[str, Any]:
    """One cell of the results: per method what was chosen and what each seed reached."""
    runs = {job.method: found[i * seeds : (i + 1) * seeds] for i, job in enumerate(chosen)}
    return {
        **asdict(cell),
        "chosen": {
            job.method: {"learning_rate": job.learning_rate, "value": job.value}
            | ({} if job.steps is None else {"steps": job.steps})
            for job in chosen
        },
        "runs": runs,
    }


def untrained_accuracies(config: NoiseConfig, worker: NoiseWorker) -> dict[str, dict[str, float]]:
    """What each base does before training, on clean prompts and (key ``base, cue``) on misleading ones."""
    out = {}
    for cell in dict.fromkeys((*config.cells, *config.screen)):
        key = untrained_key(cell.base, cell.kind)
        if key not in out:
            out[key] = worker.test(worker.base(cell.base), cell)
    return out
