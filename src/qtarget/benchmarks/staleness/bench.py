"""`qtarget bench staleness`: rules over lag, epochs and mismatch.

The protocol, the same for every rule: at each point its learning rate is tuned at its usual threshold, on seeds of their own.
Then every threshold of its grid is run on ``seeds`` seeds, which share starts, prompts and order with all other rules.
Last come penalties towards the start, beside the rule without a region, on fresh and on old samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import WORKERS, Progress, RunLog, Workers, check_settings, save_results
from qtarget.benchmarks.staleness.penalties import PENALTIES
from qtarget.benchmarks.staleness.results import summarize
from qtarget.benchmarks.staleness.rules import BASELINE, GRIDS, default
from qtarget.benchmarks.staleness.runs import TUNING_SEED, Job, Point, StalenessWorker
from qtarget.core.errors import ConfigError

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

    benchmark: ClassVar[str] = "staleness"
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

    @property
    def settings(self) -> dict[str, Any]:
        """Those that decide about every run."""
        return {name: getattr(self, name) for name in ("rounds", "sft_steps", "seeds")}

    def worker(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What runs the jobs, and its arguments."""
        return StalenessWorker, (self.rounds, self.sft_steps)

    def groups(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Seeds that one job runs: all, side by side."""
        return [tuple(seeds)]

    def rules_at(self, point: Point) -> tuple[str, ...]:
        """Those that are run there."""
        return self.rules

    def summary(self, points: Sequence[Any], penalties: Sequence[Any]) -> dict[str, Any]:
        """What the runs so far say."""
        return summarize(points, penalties)

    def thresholds(self, name: str) -> tuple[float, ...]:
        """Those of a rule that are run."""
        return GRIDS[name] if self.all_thresholds else (default(name),)

    def jobs(self) -> int:
        """How many there are in all."""
        final, tuning = (len(self.groups(range(count))) for count in (self.seeds, self.tuning_seeds))
        beside = len(self.penalty_lags) * (1 + len(PENALTIES) * len(self.penalty_weights)) * final
        return beside + sum(
            tuning * len(self.learning_rates) * (len(self.learning_rates) > 1) + final * len(self.thresholds(name))
            for point in self.points
            for name in self.rules_at(point)
        )


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
    check_settings(output, resume, config.settings)
    log, total = RunLog(output.with_suffix(".runs.jsonl"), resume), config.jobs()
    points: list[dict[str, Any]] = []
    penalties: list[dict[str, Any]] = []
    results = {
        "benchmark": config.benchmark, "config": asdict(config), "points": points, "penalties": penalties,
        "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    build, arguments = config.worker()
    with Workers(config.workers, build, *arguments) as workers:

        def done(job: Any) -> None:
            beside = f" and {job.penalty} {job.weight:g}" if job.penalty else ""
            progress(len(log.runs), total, f"{job.point}: {job.rule} {job.value:g}{beside}")

        for point in config.points:
            rates = tuned_rates(workers, log, config, point, done)
            settings = [
                Job(point, name, value, rates[name], ())
                for name in config.rules_at(point)
                for value in config.thresholds(name)
            ]
            found = on_seeds(workers, log, config, settings, range(config.seeds), done)
            runs = {f"{job.rule} {job.value:g}": one for job, one in zip(settings, found, strict=True)}
            points.append({**asdict(point), "learning_rates": rates, "runs": runs})
            results["summary"] = config.summary(points, penalties)
            save_results(output, results)
        for lag in config.penalty_lags:
            penalties.append({"lag": lag, "runs": penalty_runs(workers, log, config, lag, done)})
            results["summary"] = config.summary(points, penalties)
            save_results(output, results)
    return results


def on_seeds(
    workers: Workers, log: RunLog, config: StalenessConfig, settings: Sequence[Job], seeds: Sequence[int], done: Any
) -> list[list[dict[str, Any]]]:
    """For each setting its runs, one of each seed."""
    jobs = [replace(job, seeds=group) for job in settings for group in config.groups(seeds)]
    found = iter(workers.run(jobs, log, done))
    return [[run for _ in config.groups(seeds) for run in next(found)["runs"]] for _ in settings]


def penalty_runs(workers: Workers, log: RunLog, config: StalenessConfig, lag: int, done: Any) -> dict[str, Any]:
    """Penalties at one age of the samples, all at one rate, by name and weight; ``none 0`` is without any."""
    kinds = [(None, 0.0), *((name, weight) for name in PENALTIES for weight in config.penalty_weights)]
    rate = sorted(config.learning_rates)[len(config.learning_rates) // 2]
    settings = [Job(Point(lag), BASELINE, default(BASELINE), rate, (), name, weight) for name, weight in kinds]
    found = on_seeds(workers, log, config, settings, range(config.seeds), done)
    return {f"{job.penalty or 'none'} {job.weight:g}": one for job, one in zip(settings, found, strict=True)}


def tuned_rates(workers: Workers, log: RunLog, config: StalenessConfig, point: Point, done: Any) -> dict[str, float]:
    """For each rule the rate with the highest final success on the tuning seeds; of equals the first."""
    rules, rates = config.rules_at(point), config.learning_rates
    if len(rates) == 1:
        return dict.fromkeys(rules, rates[0])
    settings = [Job(point, name, default(name), rate, ()) for name in rules for rate in rates]
    seeds = range(TUNING_SEED, TUNING_SEED + config.tuning_seeds)
    ends = iter(fmean(run["end"] for run in one) for one in on_seeds(workers, log, config, settings, seeds, done))
    scores = {name: [next(ends) for _ in rates] for name in rules}
    return {name: rates[values.index(max(values))] for name, values in scores.items()}
