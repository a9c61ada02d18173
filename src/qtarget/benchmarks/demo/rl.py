"""``qtarget demo --rl``: one start, and six ways to go on: demonstrations, a teacher, rewards, rewards on old samples."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from qtarget.benchmarks.demo.bench import written
from qtarget.benchmarks.demo.rl_runs import START, STEPS, TEACHER, WAYS, Job, RLWorker, make_models
from qtarget.benchmarks.figure import regimes_figure
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import Progress, Workers, one_thread, quiet_libraries
from qtarget.benchmarks.sampling import GROUP, PROMPTS
from qtarget.benchmarks.seeds import over_seeds
from qtarget.core.errors import ConfigError

SCORES = {"sampled_percent": "sampled at temperature 1", "greedy_percent": "greedy"}
CAPTION = (
    "Large points: mean over seeds; small points: each seed; lines: smallest to largest seed (no confidence interval). "
    "Dashed: the start. sft reads new demonstrations, as many rows as the others sample. Stale: samples of weights four rounds "
    "old, four updates a round. Learning rates are those of a few trial runs, not of a search."
)


@dataclass(frozen=True)
class RLDemoConfig:
    """The defaults take four minutes of two cores at most.

    Attributes:
        seeds: draws of prompts, samples and order; start and teacher are the same for all.
        rounds: of 16 prompts by 8 samples.
        ways: names of ``WAYS``.
        test_rows, draws: held-out prompts, and samples of each.
        start_steps, teacher_steps: supervised steps behind both models.
        workers: processes of one thread each; the numbers do not depend on how many.
    """

    seeds: int = 3
    rounds: int = 20
    ways: tuple[str, ...] = tuple(WAYS)
    test_rows: int = 200
    draws: int = 2
    start_steps: int = STEPS[START]
    teacher_steps: int = STEPS[TEACHER]
    workers: int = 2

    def __post_init__(self) -> None:
        if min(self.seeds, self.rounds, self.workers, self.test_rows, self.draws) < 1:
            raise ConfigError(
                f"seeds {self.seeds}, rounds {self.rounds}, workers {self.workers}, test_rows {self.test_rows}, draws "
                f"{self.draws}; expected at least 1 each"
            )
        if unknown := [name for name in self.ways if name not in WAYS]:
            raise ConfigError(f"ways {', '.join(unknown)} are unknown; expected some of {'; '.join(WAYS)}")

    def jobs(self) -> Iterator[Job]:
        """Every run, seed by seed."""
        for seed in range(self.seeds):
            for name in self.ways:
                yield Job(name, seed)


def quick(config: RLDemoConfig) -> RLDemoConfig:
    """A few seconds' worth: all ways, two rounds, models of few steps. For tests, not for conclusions."""
    return replace(config, seeds=1, rounds=2, test_rows=8, draws=1, start_steps=60, teacher_steps=5, workers=1)


def run_rl_demo(config: RLDemoConfig, output: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make start and teacher, go on in every way on every seed, answer held-out prompts, write numbers and picture.

    Args:
        output: gets ``results.json`` and ``results.png``; earlier ones are replaced. All else is temporary.
        progress: called with steps done, steps in all, and what was done last.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: ``output`` is somebody else's, or another process writes there.
    """
    begin = time.perf_counter()
    return written(Path(output), lambda: measure(config, progress, begin), picture)


def measure(config: RLDemoConfig, progress: Progress | None, begin: float) -> dict[str, Any]:
    """All runs; nothing is left on disk."""
    report = progress or (lambda done, total, text: None)
    jobs, done = list(config.jobs()), count(2)
    total = 1 + len(jobs)

    def advance(job: Job, _: Any) -> None:
        report(next(done), total, f"{job.way}, seed {job.seed}")

    with quiet_libraries(), one_thread(), tempfile.TemporaryDirectory() as name:
        report(0, total, "teaching start and teacher")
        folder = Path(name)
        make_models(folder, {START: config.start_steps, TEACHER: config.teacher_steps})
        setting = (folder, config.rounds, config.test_rows, config.draws)
        here = RLWorker(*setting)
        models = {role: here.score(here.load(role)) for role in (START, TEACHER)}
        report(1, total, f"{len(jobs)} runs")
        with Workers(min(config.workers, len(jobs)), RLWorker, *setting) as workers:
            found = dict(zip(jobs, workers.map(jobs, advance), strict=True))
    runs = {name: [found[job] for job in jobs if job.way == name] for name in config.ways}
    return {
        "benchmark": "demo --rl",
        "config": asdict(config),
        "ways": {name: asdict(WAYS[name]) for name in config.ways},
        "samples_per_run": config.rounds * PROMPTS * GROUP,
        "models": models,
        "runs": runs,
        "summary": summarize(runs),
        "finding": finding(models, runs),
        "caption": CAPTION,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_facts(),
        "versions": versions(),
    }


def summarize(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per way: mean and range over seeds of both scores, and of what was seen of the samples."""
    return {
        name: {
            key: asdict(over_seeds([run[key] for run in found]))
            for key in (*SCORES, "kl_k3", "blocked")
            if key in found[0]
        }
        for name, found in runs.items()
    }


def finding(models: Mapping[str, Mapping[str, float]], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One sentence: sampled and greedy accuracy of the start, and what each way makes of them.

    Example:
        >>> start = {"start": {"sampled_percent": 50.0, "greedy_percent": 80.0}}
        >>> finding(start, {"sft": [{"sampled_percent": 70.0, "greedy_percent": 81.0}]})
        'Sampled and greedy, %, means over seeds: start 50 and 80, sft 70 and 81'
    """
    means = {name: [over_seeds([run[key] for run in found]).mean for key in SCORES] for name, found in runs.items()}
    ends = {START: [models[START][key] for key in SCORES]} | means
    said = ", ".join(f"{name} {sampled:.0f} and {greedy:.0f}" for name, (sampled, greedy) in ends.items())
    return f"Sampled and greedy, %, means over seeds: {said}"


def picture(results: Mapping[str, Any]) -> Any:
    """The figure of ``results.json``: a panel for samples, one for greedy answers."""
    panels = {
        words: ({name: [run[key] for run in found] for name, found in results["runs"].items()},
                results["models"][START][key])
        for key, words in SCORES.items()
    }  # fmt: skip
    return regimes_figure(panels, results["finding"], results["caption"])
