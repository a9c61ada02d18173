"""`qtarget bench staleness`: rules over lag, epochs and mismatch.

The protocol, the same for every rule: at each point its learning rate is tuned at its usual threshold, on seeds of their own.
Then every threshold of its grid is run on ``seeds`` seeds, which share starts, prompts and order with all other rules.
Last come penalties towards the start, beside the rule without a region, on fresh and on old samples.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import WORKERS, Progress, RunLog, Workers, check_settings, save_results
from qtarget.benchmarks.staleness.penalties import PENALTIES
from qtarget.benchmarks.staleness.results import summarize
from qtarget.benchmarks.staleness.rules import BASELINE, GRIDS, default
from qtarget.benchmarks.staleness.runs import Job, Point, StalenessWorker
from qtarget.core.errors import ConfigError

TUNING_SEED = 1000
POINTS = (
    Point(), Point(lag=4), Point(lag=16), Point(lag=32), Point(epochs=4), Point(mismatch=0.3), Point(16, 4),
    Point(16, 4, 0.3), Point(mismatch=0.1), Point(epochs=8),
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
        penalty_lags, penalty_weights: where penalties are compared, and how strong.
        workers: processes of one thread.
    """

    points: tuple[Point, ...] = POINTS
    rules: tuple[str, ...] = tuple(GRIDS)
    all_thresholds: bool = True
    seeds: int = 10
    tuning_seeds: int = 3
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    rounds: int = 48
    sft_steps: int = 110
    penalty_lags: tuple[int, ...] = (0, 16)
    penalty_weights: tuple[float, ...] = (0.02, 0.2)
    workers: int = WORKERS

    def __post_init__(self) -> None:
        if min(self.seeds, self.tuning_seeds, self.rounds, self.workers) < 1:
            raise ConfigError("seeds, rounds and workers; expected at least 1 each")
        if unknown := set(self.rules) - set(GRIDS):
            raise ConfigError(f"rules {', '.join(sorted(unknown))} have no grid; expected some of {', '.join(GRIDS)}")

    def thresholds(self, name: str) -> tuple[float, ...]:
        """Those of a rule that are run."""
        return GRIDS[name] if self.all_thresholds else (default(name),)

    def jobs(self) -> int:
        """How many there are in all; one is of all seeds."""
        tuning = len(self.rules) * len(self.learning_rates) * (len(self.learning_rates) > 1)
        settings = sum(len(self.thresholds(name)) for name in self.rules)
        beside = len(self.penalty_lags) * (1 + len(PENALTIES) * len(self.penalty_weights))
        return len(self.points) * (tuning + settings) + beside


QUICK = StalenessConfig(
    points=(Point(), Point(lag=16), Point(epochs=4), Point(16, 4, 0.3)), all_thresholds=False, seeds=3,
    learning_rates=(3e-3,), penalty_lags=(16,), penalty_weights=(0.2,),
)  # fmt: skip
"""A minute of two cores: enough to see that it runs, not for conclusions."""


def run_staleness(config: StalenessConfig, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Run all points; results are saved after each.

    Args:
        output: JSON; finished runs stand beside it in ``.runs.jsonl``.
        resume: go on with the finished runs there.
        progress: called with runs done, runs in all, and what was done last.
    """
    check_settings(output, resume, {name: asdict(config)[name] for name in ("rounds", "sft_steps", "seeds")})
    log, total = RunLog(output.with_suffix(".runs.jsonl"), resume), config.jobs()
    points: list[dict[str, Any]] = []
    penalties: list[dict[str, Any]] = []
    results = {
        "benchmark": "staleness", "config": asdict(config), "points": points, "penalties": penalties,
        "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    with Workers(config.workers, StalenessWorker, config.rounds, config.sft_steps) as workers:

        def done(job: Any) -> None:
            beside = f" and {job.penalty} {job.weight:g}" if job.penalty else ""
            progress(len(log.runs), total, f"{job.point}: {job.rule} {job.value:g}{beside}")

        for point in config.points:
            rates = tuned_rates(workers, log, config, point, done)
            jobs = [
                Job(point, name, value, rates[name], tuple(range(config.seeds)))
                for name in config.rules
                for value in config.thresholds(name)
            ]
            found = workers.run(jobs, log, done)
            runs = {f"{job.rule} {job.value:g}": one["runs"] for job, one in zip(jobs, found, strict=True)}
            points.append({**asdict(point), "learning_rates": rates, "runs": runs})
            results["summary"] = summarize(points, penalties)
            save_results(output, results)
        for lag in config.penalty_lags:
            penalties.append({"lag": lag, "runs": penalty_runs(workers, log, config, lag, done)})
            results["summary"] = summarize(points, penalties)
            save_results(output, results)
    return results


def penalty_runs(workers: Workers, log: RunLog, config: StalenessConfig, lag: int, done: Any) -> dict[str, Any]:
    """Penalties at one age of the samples, all at one rate, by name and weight; ``none 0`` is without any."""
    settings = [(None, 0.0), *((name, weight) for name in PENALTIES for weight in config.penalty_weights)]
    rate = sorted(config.learning_rates)[len(config.learning_rates) // 2]
    seeds = tuple(range(config.seeds))
    jobs = [Job(Point(lag), BASELINE, default(BASELINE), rate, seeds, name, weight) for name, weight in settings]
    found = workers.run(jobs, log, done)
    return {f"{job.penalty or 'none'} {job.weight:g}": one["runs"] for job, one in zip(jobs, found, strict=True)}


def tuned_rates(workers: Workers, log: RunLog, config: StalenessConfig, point: Point, done: Any) -> dict[str, float]:
    """For each rule the rate with the highest final success on the tuning seeds; of equals the first."""
    if len(config.learning_rates) == 1:
        return dict.fromkeys(config.rules, config.learning_rates[0])
    seeds = tuple(range(TUNING_SEED, TUNING_SEED + config.tuning_seeds))
    jobs = [Job(point, name, default(name), rate, seeds) for name in config.rules for rate in config.learning_rates]
    ends = iter(fmean(run["end"] for run in one["runs"]) for one in workers.run(jobs, log, done))
    scores = {name: [next(ends) for _ in config.learning_rates] for name in config.rules}
    return {name: config.learning_rates[values.index(max(values))] for name, values in scores.items()}
