"""`qtarget bench staleness --model`: the same protocol on the embedded base, at four points and fewer rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from qtarget.benchmarks.staleness.bench import StalenessConfig
from qtarget.benchmarks.staleness.model import ModelWorker
from qtarget.benchmarks.staleness.results import point_name
from qtarget.benchmarks.staleness.rules import BASELINE, default
from qtarget.benchmarks.staleness.runs import Point
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends

POINTS = (Point(), Point(lag=8), Point(epochs=4), Point(lag=8, epochs=4))
NO_REGION = f"{BASELINE} {default(BASELINE):g}"
SCORES = {"sampled": "right_sampled", "greedy": "right_greedy"}


@dataclass(frozen=True)
class ModelConfig(StalenessConfig):
    """The embedded base after ``sft_steps``; the defaults are about 40 minutes of one core.

    Attributes:
        prompts: of a round; each is answered 8 times, and a round is one update an epoch.
        test_rows, draws: held-out prompts, and samples of each.
    """

    benchmark: ClassVar[str] = "staleness --model"
    points: tuple[Point, ...] = POINTS
    rules: tuple[str, ...] = (BASELINE, "ppo_clip", "dppo_tv", "drpo")
    all_thresholds: bool = False
    seeds: int = 5
    tuning_seeds: int = 1
    learning_rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4)
    rounds: int = 20
    sft_steps: int = 100
    penalty_lags: tuple[int, ...] = field(default=(), init=False)
    prompts: int = 8
    test_rows: int = 200
    draws: int = 4

    @property
    def settings(self) -> dict[str, Any]:
        # without seeds, each of which is a job: more of them may follow
        names = ("rounds", "sft_steps", "prompts", "test_rows", "draws")
        return {name: getattr(self, name) for name in names}

    def worker(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return ModelWorker, (self.rounds, self.sft_steps, self.prompts, self.test_rows, self.draws)

    def groups(self, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        """Each by itself: a run takes half a minute, and a stopped bench loses no more."""
        return [(seed,) for seed in seeds]

    def rules_at(self, point: Point) -> tuple[str, ...]:
        """Where samples are fresh and used once, every ratio is 1, and all rules are one run to the bit."""
        return self.rules[:1] if point == Point() else self.rules

    def summary(self, points: Sequence[Any], penalties: Sequence[Any]) -> dict[str, Any]:
        return summarize_model(points, self.draws)


QUICK_MODEL = ModelConfig(
    points=(Point(), Point(1, 2)), rules=(BASELINE, "dppo_tv"), seeds=2, learning_rates=(2e-4,), rounds=3, sft_steps=60,
    prompts=2, test_rows=16, draws=1,
)  # fmt: skip
"""Seconds: enough to see that it runs, not for conclusions."""


def summarize_model(points: Sequence[Mapping[str, Any]], draws: int) -> dict[str, Any]:
    """Per point and rule: sampled and greedy percent, the paired differences to no region, KL and share blocked.

    Intervals are over seeds and held-out prompts, resampled crosswise.
    """
    rows = []
    for point in points:
        runs = point["runs"]
        first = runs[NO_REGION][0]
        rows.append(
            {
                **{name: point[name] for name in ("lag", "epochs", "learning_rates")},
                "start": {"sampled": round(100 * first["start"], 1), "greedy": round(100 * first["start_greedy"], 1)},
                "settings": {name: _setting(found, runs[NO_REGION], draws) for name, found in runs.items()},
            }
        )
    return {"points": rows, "finding": model_finding(rows)}


def _setting(found: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], draws: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for score, key in SCORES.items():
        each = 100 / (draws if score == "sampled" else 1)
        own, other = (each * np.array([run[key] for run in runs]) for runs in (found, base))
        out[score] = rounded_interval(own, 1)
        if found is not base:
            out[f"{score}_to_no_region"] = rounded_interval(own - other, 1)
    out["collapsed"] = sum(run["end"] < run["start"] for run in found)
    return out | {key: round(sum(run[key] for run in found) / len(found), 5) for key in ("kl_k3", "blocked")}


def model_finding(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: which rules differ for certain from no region, sampled, and where."""
    parts = []
    for row in rows:
        gains = {
            name.split()[0]: one["sampled_to_no_region"] for name, one in row["settings"].items() if name != NO_REGION
        }
        said = [f"{name} {gain['mean']:+.1f}" for name, gain in gains.items() if gain["low"] > 0 or gain["high"] < 0]
        parts += [f"{_name(row)}: {', '.join(said)}"] if said else []
    if not parts:
        return "No interval of a difference to no region excludes zero"
    return f"Sampled answers, points to no region, where the interval excludes zero: {'; '.join(parts)}"


def _name(row: Mapping[str, Any]) -> str:
    return point_name({**row, "mismatch": 0.0}).removesuffix(", mismatch 0")


def model_table(results: Mapping[str, Any]) -> str:
    """A line a point and rule; the start's percent in brackets in the head."""
    rows, lines = results["summary"]["points"], []
    for row in rows:
        for name, one in row["settings"].items():
            ends, rate = [f"{one[score]['mean']:.1f}" for score in SCORES], row["learning_rates"][name.split()[0]]
            gains = [one.get(f"{score}_to_no_region") for score in SCORES]
            against = ["" if gain is None else with_ends(gain, "+.1f", "+.1f") for gain in gains]
            rule = "no region" if name == NO_REGION else name
            lines.append(
                [_name(row), rule, f"{rate:g}", *ends, *against, f"{one['kl_k3']:.2g}", f"{one['blocked']:.1%}"]
            )
    start = rows[0]["start"]
    head = ["point", "rule", "rate", *(f"{score}, % ({start[score]:.1f})" for score in SCORES)]
    head += [f"{score}, to no region" for score in SCORES] + ["KL", "blocked"]
    return markdown_table(head, lines)
