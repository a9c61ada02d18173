"""The comparison itself: the base, learning rates tuned on one half of the rows for the other, then the seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtarget.benchmarks.pool import RunLog
from qtarget.comparison.budget import Plan, about, fitting, left_out, mean_seconds
from qtarget.comparison.jobs import TUNING_SEED, Job, Result
from qtarget.comparison.pools import Pool
from qtarget.core.errors import ConfigError, counted
from qtarget.storage.files import digest, write_atomic

RUNS, ROWS = "runs.jsonl", "rows"
"""In the folder: finished runs, a line each, and their completions, a file each."""
Advance = Callable[[int, int, str], None]


@dataclass
class Found:
    """What a comparison found out.

    Attributes:
        plan: what was run in the end.
        base: of the untrained model.
        tuning: contender -> rate -> result.
        chosen: contender -> the rates for the rows of half 0 and of half 1; each was chosen on the other half.
        best: contender -> the rate that is best on all rows, for whoever trains it.
        final: (contender, rate, seed) -> result.
        left_out: what was not run or failed, and why.
        notes: contender -> what a reader of its numbers must know.
    """

    plan: Plan
    base: Result
    tuning: dict[str, dict[float, Result]] = field(default_factory=dict)
    chosen: dict[str, tuple[float, float]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    final: dict[tuple[str, float, int], Result] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)


class Comparison:
    """Runs a plan in a folder, and goes on where a kill stopped it: finished runs are not run again.

    Args:
        folder: held by the caller.
        halves: 0 or 1 a row.
        at_once: jobs that the pool runs at a time, for the budget.
        seconds: that there are; None: as long as it takes.
    """

    def __init__(
        self, folder: Path, pool: Pool, halves: Sequence[int], *, at_once: int, seconds: float | None, advance: Advance
    ) -> None:
        self._folder, self._pool, self._halves = folder, pool, halves
        self._at_once, self._seconds, self._advance = at_once, seconds, advance
        self._log, self._begin = RunLog(folder / RUNS, resume=True), time.monotonic()
        self._told, self._total, self._failed = set[str](), 1, dict[str, str]()
        self._took, self._certain = list[float](), False

    def run(self, plan: Plan) -> Found:
        """Everything; see ``Found``.

        Raises:
            ConfigError: the base or the baseline cannot be run, or no comparison fits into the budget.
        """
        self._total = 1 + plan.tuning + plan.final
        base = self._jobs([Job("base", plan.contenders[0])])[0]
        if base is None:
            raise ConfigError(f"the untrained base cannot be measured: {self._failed['base']}")
        found = Found(plan, base)
        found.plan = self._planned(found, self._first_run(found))
        self._tune(found)
        found.plan = self._replanned(found)
        self._finish(found)
        found.plan = Plan(tuple(n for n in found.plan.contenders if n in found.chosen), plan.rates, found.plan.seeds)
        return found

    # -- parts ------------------------------------------------------------------------------------------------

    def _first_run(self, found: Found) -> float | None:
        """Seconds of the baseline's first run, which is measured where a budget asks for a plan."""
        if self._seconds is None:
            return None
        plan = found.plan
        kind, seed = ("tune", TUNING_SEED) if plan.tuning else ("final", 0)
        (result,) = self._jobs([Job(kind, plan.contenders[0], plan.rates[0], seed, found.base["steps"])])
        if result is None:
            raise ConfigError(f"{plan.contenders[0]} cannot be trained: {next(iter(self._failed.values()))}")
        return result["seconds"]

    def _planned(self, found: Found, a_run: float | None) -> Plan:
        if self._seconds is None or a_run is None:
            return found.plan
        fits = fitting(found.plan, self._left(), a_run, self._at_once)
        return self._reduced(found, fits, a_run)

    def _replanned(self, found: Found) -> Plan:
        if self._seconds is None or not found.tuning:
            return found.plan
        a_run = mean_seconds({f"{n} {r}": one for n, rates in found.tuning.items() for r, one in rates.items()})
        # where the halves disagree, a contender needs twice the runs
        a_run *= sum(len(set(rates)) for rates in found.chosen.values()) / max(1, len(found.chosen))
        return self._reduced(found, fitting(found.plan, self._left(), a_run, self._at_once, tuned=True), a_run)

    def _reduced(self, found: Found, fits: Plan, a_run: float) -> Plan:
        found.left_out += left_out(found.plan, fits, a_run)
        self._total = 1 + fits.tuning + fits.final
        return fits

    def _left(self) -> float:
        assert self._seconds is not None
        return self._seconds - (time.monotonic() - self._begin)

    def _tune(self, found: Found) -> None:
        plan, steps = found.plan, found.base["steps"]
        if not plan.tuning:
            for name in plan.contenders:
                found.chosen[name], found.best[name] = (plan.rates[0], plan.rates[0]), plan.rates[0]
            return
        jobs = [Job("tune", name, rate, TUNING_SEED, steps) for rate in plan.rates for name in plan.contenders]
        for job, result in zip(jobs, self._jobs(jobs), strict=True):
            if result is not None:
                found.tuning.setdefault(job.contender, {})[job.rate] = result
        for name in plan.contenders:
            self._choose(found, name)

    def _choose(self, found: Found, name: str) -> None:
        failed = [rate for rate in found.plan.rates if rate not in found.tuning.get(name, {})]
        notes = found.notes.setdefault(name, [])
        notes += [f"rate {rate:g} failed: {self._failed[Job('tune', name, rate, TUNING_SEED).key]}" for rate in failed]
        known = found.tuning.get(name)
        if not known:
            self._drop(found, name, notes.pop() if notes else "every rate failed")
            return
        # rows of a half are judged at the rate that the other half chose
        found.chosen[name] = (best_rate(known, self._halves, 1), best_rate(known, self._halves, 0))
        found.best[name] = best_rate(known, self._halves, None)
        grid = sorted(found.plan.rates)
        if len(grid) > 2 and found.best[name] in (grid[0], grid[-1]):
            which = "smallest" if found.best[name] == grid[0] else "largest"
            notes.append(f"its best learning rate, {found.best[name]:g}, is the {which} tried; --rates may go further")

    def _finish(self, found: Found) -> None:
        plan, steps = found.plan, found.base["steps"]
        for name in [name for name in found.chosen if name not in plan.contenders]:
            del found.chosen[name]
        jobs = [
            Job("final", name, rate, seed, steps)
            for seed in range(plan.seeds) for name in plan.contenders if name in found.chosen
            for rate in dict.fromkeys(found.chosen[name])
        ]  # fmt: skip
        self._total = len(self._told | {job.key for job in jobs})
        # final runs look at the validation rows too, so those that tuned, which were shorter, tell nothing of them
        self._took, self._certain = [], True
        for job, result in zip(jobs, self._jobs(jobs), strict=True):
            if result is not None:
                found.final[job.contender, job.rate, job.seed] = result
            elif job.contender in found.chosen:
                self._drop(found, job.contender, f"seed {job.seed} failed: {self._failed[job.key]}")

    def _drop(self, found: Found, name: str, why: str) -> None:
        if name == found.plan.contenders[0]:
            raise ConfigError(f"{name}, which all are compared with, cannot be trained: {why}")
        found.chosen.pop(name, None)
        found.left_out.append(f"{name}: {why}")

    # -- running ----------------------------------------------------------------------------------------------

    def _jobs(self, jobs: Sequence[Job]) -> list[Result | None]:
        """Results in order, None where a run failed; what is in the file of finished runs is read from there."""
        open_jobs = [job for job in jobs if job.key not in self._log.runs]
        if known := {job.key for job in jobs if job not in open_jobs} - self._told:
            self._tell(known, f"{counted(len(known), 'run')} finished before")
        self._pool.map(open_jobs, self._save)
        return [self._log.runs.get(job.key) for job in jobs]

    def _save(self, job: Job, result: dict[str, Any]) -> None:
        if (why := result.get("failed")) is not None:
            self._failed[job.key] = why
            self._tell({job.key}, f"{job.words}: failed")
            return
        texts = result.pop("texts")
        write_atomic(texts_file(self._folder, job.key), json.dumps(texts).encode())  # first: a logged run has its texts
        self._log.add(job.key, result)
        self._took += [result["seconds"]] if job.kind != "base" else []
        self._tell({job.key}, f"{job.words}: {result['seconds']:.1f} s")

    def _tell(self, keys: set[str], text: str) -> None:
        self._told |= keys
        done, total = len(self._told), max(self._total, len(self._told))
        if self._took and done < total:
            left = sum(self._took) / len(self._took) * (total - done) / self._at_once
            text += f"; {'' if self._certain else 'at least '}{about(left)} left"
        self._advance(done, total, text)


def texts_file(folder: Path, key: str) -> Path:
    """Where a run's completions are: set -> a text a row, or None."""
    return folder / ROWS / f"{digest(key.encode())}.json"


def row_scores(result: Result, name: str = "data") -> tuple[list[float], list[float]]:
    """A score a row, larger is better, and the rows' weights: shares of right answers, else minus nats a token.

    A row without either has weight 0.
    """
    found = result["sets"][name]
    if found["scores"] is not None:
        return [score or 0.0 for score in found["scores"]], [float(score is not None) for score in found["scores"]]
    return [-nats / tokens if tokens else 0.0 for nats, tokens in found["nll"]], [float(t) for _, t in found["nll"]]


def best_rate(known: Mapping[float, Result], halves: Sequence[int], half: int | None) -> float:
    """The rate with the best mean score on a half of the rows, all with None; of equals the first."""

    def mean(result: Result) -> float:
        scores, weights = row_scores(result)
        kept = [i for i, part in enumerate(halves) if half is None or part == half]
        return sum(scores[i] * weights[i] for i in kept) / (sum(weights[i] for i in kept) or 1.0)

    return max(known, key=lambda rate: mean(known[rate]))
