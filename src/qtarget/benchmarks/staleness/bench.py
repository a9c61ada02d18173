"""`qtarget bench staleness`: rules over lag, epochs and mismatch.

The protocol, the same for every rule: at each point its learning rate is tuned at its usual threshold, on seeds of their own.
Then every threshold of its grid is run on ``seeds`` seeds, which share starts, prompts and order with all other rules.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import WORKERS, Progress, RunLog, Workers, check_settings, save_results
from qtarget.benchmarks.staleness.results import summarize
from qtarget.benchmarks.staleness.rules import GRIDS, default
from qtarget.benchmarks.staleness.runs import Job, Point, StalenessWorker
from qtarget.core.errors import ConfigError

TUNING_SEED = 1000
POINTS = (
    Point(), Point(lag=4), Point(lag=16), Point(lag=32), Point(epochs=4), Point(epochs=8),
    Point(mismatch=0.1), Point(mismatch=0.3), Point(16, 4), Point(16, 4, 0.3),
)  # fmt: skip


@dataclass(frozen=True)
class StalenessConfig:
    """Defaults are the full setting.

    Attributes:
        points: of lag, epochs and mismatch.
        rules: names; the one without a region must be among them.
        all_thresholds: every threshold of a rule's grid, or its usual one alone.
        seeds: of the final runs.
        tuning_seeds: on which learning rates are chosen.
        learning_rates: the grid; a single one is not tuned.
        rounds: of sampling, 16 prompts by 8 answers each.
        sft_steps: supervised steps of the start.
        workers: processes of one thread.
    """

    points: tuple[Point, ...] = POINTS
    rules: tuple[str, ...] = tuple(GRIDS)
    all_thresholds: bool = True
    seeds: int = 10
    tuning_seeds: int = 2
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    rounds: int = 60
    sft_steps: int = 110
    workers: int = WORKERS

    def __post_init__(self) -> None:
        if min(self.seeds, self.tuning_seeds, self.rounds, self.workers) < 1:
            raise ConfigError("seeds, rounds and workers; expected at least 1 each")
        if unknown := set(self.rules) - set(GRIDS):
            raise ConfigError(f"rules {', '.join(sorted(unknown))} have no grid; expected some of {', '.join(GRIDS)}")

    def thresholds(self, name: str) -> tuple[float, ...]:
        """Those of a rule that are run."""
        return GRIDS[name] if self.all_thresholds else (default(name),)

    def runs(self) -> int:
        """How many there are in all."""
        tuning = len(self.rules) * len(self.learning_rates) * self.tuning_seeds * (len(self.learning_rates) > 1)
        return len(self.points) * (tuning + self.seeds * sum(len(self.thresholds(name)) for name in self.rules))


QUICK = StalenessConfig(
    points=(Point(), Point(lag=16), Point(epochs=4), Point(16, 4, 0.3)), all_thresholds=False, seeds=3,
    learning_rates=(3e-3,),
)  # fmt: skip
"""A minute of two cores: enough to see that it runs, not for conclusions."""


def run_staleness(config: StalenessConfig, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Run all points; results are saved after each.

    Args:
        output: JSON; finished runs stand beside it in ``.runs.jsonl``.
        resume: go on with the finished runs there.
        progress: called with runs done, runs in all, and what was done last.
    """
    check_settings(output, resume, {name: asdict(config)[name] for name in ("rounds", "sft_steps")})
    log, total = RunLog(output.with_suffix(".runs.jsonl"), resume), config.runs()
    points: list[dict[str, Any]] = []
    results = {
        "benchmark": "staleness", "config": asdict(config), "points": points, "machine": machine_facts(),
        "versions": versions(),
    }  # fmt: skip
    with Workers(config.workers, StalenessWorker, config.rounds, config.sft_steps) as workers:
        for point in config.points:

            def done(job: Any) -> None:
                progress(len(log.runs), total, f"{job.point}: {job.rule} {job.value:g}")

            rates = tuned_rates(workers, log, config, point, done)
            jobs = [
                Job(point, name, value, rates[name], seed)
                for name in config.rules
                for value in config.thresholds(name)
                for seed in range(config.seeds)
            ]
            found = workers.run(jobs, log, done)
            runs: dict[str, list[dict[str, Any]]] = {}
            for job, result in zip(jobs, found, strict=True):
                runs.setdefault(f"{job.rule} {job.value:g}", []).append(result)
            points.append({**asdict(point), "learning_rates": rates, "runs": runs})
            results["summary"] = summarize(points)
            save_results(output, results)
    return results


def tuned_rates(workers: Workers, log: RunLog, config: StalenessConfig, point: Point, done: Any) -> dict[str, float]:
    """For each rule the rate with the highest final success on the tuning seeds; of equals the first."""
    if len(config.learning_rates) == 1:
        return dict.fromkeys(config.rules, config.learning_rates[0])
    jobs = [
        Job(point, name, default(name), rate, TUNING_SEED + seed)
        for name in config.rules
        for rate in config.learning_rates
        for seed in range(config.tuning_seeds)
    ]
    ends = iter(result["end"] for result in workers.run(jobs, log, done))
    scores = {
        name: [fmean(next(ends) for _ in range(config.tuning_seeds)) for _ in config.learning_rates]
        for name in config.rules
    }
    return {name: config.learning_rates[values.index(max(values))] for name, values in scores.items()}
