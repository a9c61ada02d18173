"""`qtarget bench noise --base smollm2`: the claims about noise where they were made, on an instruct model that others trained.

The machinery, methods and kinds of noise are those of `qtarget bench noise`. The base is one, adapters are trained, and what
the model should not forget is asked too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.bench import RANDOM, NoiseConfig, cell_results, tuned
from qtarget.benchmarks.noise.results import summarize, untrained_key
from qtarget.benchmarks.noise.runs import Cell, Job, Setting
from qtarget.benchmarks.pool import Progress, RunLog, Workers, check_settings, one_thread, quiet_libraries, save_results
from qtarget.benchmarks.real.demonstrations import MARKED, MOST_MARKED, SOLVED, SOLVED_ROWS, WRITTEN, files_of
from qtarget.benchmarks.real.instructions import asked_of, check_ready, checker_versions, instruction_rows
from qtarget.benchmarks.real.worker import RealWorker, Scope
from qtarget.benchmarks.start import Start
from qtarget.core.errors import ConfigError
from qtarget.storage.files import digest_file

BASE = "smollm2"
WRONG = "wrong_answer"
UNTRAINED = "untrained"
RATE = 1e-3
"""Of adapters on this model: the first of the grid, and all of it where nothing is tuned."""
GRID = (RATE, 2e-3)
FULL = NoiseConfig(
    cells=(Cell(BASE, WRONG, 0.4), Cell(BASE, RANDOM, 0.4), Cell(BASE, RANDOM, 0.0)),
    names=(
        "sft", "sft, filtered rows", "sft, marks left out", "consensus", "crossfit_consensus", "sft, rows by cross-fit",
        "target_sft", "asft", "sft_kl", "dft", "p_power", "prior_surprise",
    ),
    screen=(), seeds=3, steps=40, learning_rates=GRID,
)  # fmt: skip
"""Half a night's run: learning rate and hyper-parameter tuned on noisy validation rows, three seeds."""
SHORT = replace(
    FULL,
    names=("sft", "sft, marks left out", "consensus", "crossfit_consensus", "sft, filtered rows"),
    seeds=1, steps=20, learning_rates=(RATE,),
)  # fmt: skip
"""Half an hour's run: five contenders, three points, one seed; tuned where several rates are named."""
POINTS_OF_WRITTEN = (Cell(BASE, RANDOM, 0.4), Cell(BASE, "other_response", 0.4), Cell(BASE, RANDOM, 0.0))
"""Of demonstrations whose answers no program checks: none of them can be made wrong by one."""
POINTS_OF_SOLVED = (Cell(BASE, MARKED, 0.4), Cell(BASE, MARKED, 0.0))
"""Of GSM8K, whose wrong solutions are marked by the data."""
QUICK = replace(SHORT, cells=(Cell(BASE, WRONG, 0.4),), names=("sft", "sft, marks left out", "consensus"), steps=12)


@dataclass(frozen=True)
class RealConfig:
    """What is run.

    Attributes:
        noise: points, methods, seeds, steps, rates, processes, and the start.
        scope: rows and adapters.
        is_tuned: whether every method tunes its rate and its hyper-parameter; else both are the first of their grids.
    """

    noise: NoiseConfig = FULL
    scope: Scope = field(default_factory=lambda: Scope(dtype="bfloat16"))
    is_tuned: bool = True

    def with_start(self, start: Start, data: Path | None, workers: int) -> RealConfig:
        """The same from this model, with these texts."""
        noise = replace(self.noise, start=start, data=None if data is None else str(data), workers=workers)
        return replace(self, noise=noise)

    def with_part(self, part: Callable[[NoiseConfig], NoiseConfig]) -> RealConfig:
        """The same with other points, methods, seeds or rates; who names several rates wants them tuned, whatever the size."""
        noise = part(self.noise)
        return replace(self, noise=noise, is_tuned=self.is_tuned or len(noise.learning_rates) > 1)

    def with_tasks(self, tasks: str) -> RealConfig:
        """The same on other demonstrations; written ones stand in chat form, at as many points of their own."""
        noise, scope = replace(self.noise, tasks=tasks), replace(self.scope, tasks=tasks)
        if tasks in WRITTEN:
            points = POINTS_OF_SOLVED if tasks == SOLVED else POINTS_OF_WRITTEN
            noise = replace(noise, cells=points[: len(noise.cells)])
            scope = replace(scope, form="chat")
        if tasks == SOLVED:
            scope = replace(scope, train_rows=min(scope.train_rows, SOLVED_ROWS))
        return replace(self, noise=noise, scope=scope)

    def runs(self) -> int:
        """How many there are in all."""
        if self.is_tuned:
            return self.noise.runs()
        return sum(self.noise.seeds * len(self.noise.methods_at(cell)) for cell in self.noise.cells)


SMALL = Scope(form="instruction", train_rows=320, test_rows=150, texts=20, prompts=160, dtype="bfloat16")
SIZES = {
    "full": RealConfig(),
    "short": RealConfig(SHORT, SMALL, is_tuned=False),
    "quick": RealConfig(
        QUICK, replace(SMALL, train_rows=192, test_rows=40, texts=10, prompts=4, answer_tokens=32), is_tuned=False
    ),
}


def run_real(config: RealConfig, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Run point by point; results are saved after each, finished runs as they come.

    Args:
        output: JSON; finished runs stand beside it in ``.runs.jsonl``.
        resume: go on with the finished runs there.
        progress: called with runs done, runs in all, and what was done last.

    Raises:
        DataError, MissingDependencyError: see ``check_ready``.
    """
    noise, total = config.noise, config.runs()
    data = Path(noise.data) if noise.data else None
    check_ready(data)
    if any(cell.kind == MARKED and cell.rate > MOST_MARKED for cell in noise.cells):
        raise ConfigError(
            f"{MARKED}: at most {MOST_MARKED:.0%} of the questions have a wrong solution; ask for a lower rate"
        )
    settings = {
        "base": BASE, "scope": asdict(config.scope), "steps": noise.steps, "start": asdict(noise.start),
        "files": None if data is None else {file: digest_file(data / file) for file in files_of(config.scope.tasks)},
    }  # fmt: skip
    check_settings(output, resume, settings)
    log = RunLog(output.with_suffix(".runs.jsonl"), resume)
    setting = Setting("embedded", data, output.parent, noise.steps, noise.start)
    cells: list[dict[str, Any]] = []
    results = {
        "benchmark": "noise on a real model", "config": {**asdict(noise), **settings, "is_tuned": config.is_tuned},
        "base": "SmolLM2-135M-Instruct, four-bit weights (Q4_1)", "untrained": untrained(noise, setting, config, log),
        "instructions": asked_instructions(data, config.scope), "cells": cells, "machine": machine_facts(),
        "versions": versions() if data is None else {**versions(), **checker_versions()},
    }  # fmt: skip
    save_results(output, results)
    with Workers(noise.workers, RealWorker, setting, config.scope) as workers:
        for cell in noise.cells:

            def done(job: Any, cell: Cell = cell) -> None:
                progress(len(log.runs) - 1, total, f"{cell.kind} {cell.rate:g}: {job.method}")

            chosen = chosen_jobs(config, workers, log, cell, done)
            jobs = [replace(job, seed=seed, tuning=False) for job in chosen for seed in range(noise.seeds)]
            # seed by seed, as a worker keeps what the base says of one seed's rows; then in the order of the table
            workers.run([job for seed in range(noise.seeds) for job in jobs if job.seed == seed], log, done)
            cells.append(cell_results(cell, chosen, workers.run(jobs, log, done), noise.seeds))
            results["summary"] = summarize(results)
            if config.noise.seeds < 2:
                results["summary"]["finding"] = "one seed ranks nothing; the tables say what was found"
            save_results(output, results)
    return results


def asked_instructions(data: Path | None, scope: Scope) -> dict[str, Any] | None:
    """Which prompts of IFEval all contenders get, how many instructions each has, and where answers are cut."""
    rows = instruction_rows(data, scope.prompts)
    keys = [row["key"] for row in rows]
    return {"keys": keys, "asked": asked_of(rows), "answer_tokens": scope.answer_tokens} if rows else None


def chosen_jobs(
    config: RealConfig, workers: Workers, log: RunLog, cell: Cell, done: Callable[[Any], None]
) -> list[Job]:
    """For each method the job that its seeds repeat: the best on noisy validation rows, or the first of its grids."""
    if config.is_tuned:
        return tuned(workers, log, cell, config.noise, done)
    rate = config.noise.learning_rates[0]
    return [Job(cell, method.name, rate, method.grid[0], 0, False) for method in config.noise.methods_at(cell)]


def untrained(noise: NoiseConfig, setting: Setting, config: RealConfig, log: RunLog) -> dict[str, dict[str, Any]]:
    """What the base does before training; measured once."""
    if UNTRAINED not in log.runs:
        with quiet_libraries(), one_thread():
            worker = RealWorker(setting, config.scope)
            log.add(UNTRAINED, worker.test(worker.base(BASE), noise.cells[0]))
    return {untrained_key(BASE, cell.kind): log.runs[UNTRAINED] for cell in noise.cells}
