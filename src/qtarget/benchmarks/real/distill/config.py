"""What `bench distill --base smollm2` runs: students, texts, contenders, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qtarget.benchmarks.distill.data import CacheKind
from qtarget.benchmarks.distill.runs import BASELINE, METHODS, Job, Method
from qtarget.benchmarks.pool import WORKERS
from qtarget.benchmarks.start import Scale, Start

HALF, SMALL = "half", "small"
DOLLY, STORIES = "dolly", "stories"
UNTRAINED, TEACHER = "untrained", "teacher"
SMALL_SCALE = Scale(width=256, layers=3, heads=4)
"""15 million parameters with a vocabulary of 49,152."""
CONTENDERS = {
    **{name: METHODS[name] for name in (BASELINE, "top8_bucket", "top8_spread", "top8_renormalize", "draws50")},
    "top64_bucket": Method("top64_bucket", "distillation", cache=CacheKind(top_k=64)),
    "hybrid_top64": Method("hybrid_top64", "hybrid_distillation", {"teacher_weight": 0.5}, CacheKind(top_k=64)),
}


@dataclass(frozen=True)
class PointJob(Job):
    """One run of a student on a text."""

    student: str
    text: str

    @property
    def key(self) -> str:
        """Names the run in the file of finished runs."""
        return f"{self.student}|{self.text}|{super().key}"


@dataclass(frozen=True)
class RealDistillConfig:
    """Defaults are the full setting.

    Attributes:
        points: student and text.
        contenders: names of ``CONTENDERS``.
        fractions: of the training rows.
        rates: the grid of each student; all contenders share it, and the one of least KL on validation rows is taken.
        is_tuned: whether every contender takes its own; else all take that of sft.
        tuning_fraction: of the rows, when the rate is chosen.
        steps, batch_size: of every run, whatever the fraction.
        length: tokens at which rows are cut.
        train_rows, validation_rows, test_rows: of each text.
        prompts: with instructions that a program can check (IFEval), which those who learn dolly are asked; 0: none.
        answer_tokens: where an answer to one of them is cut.
        seed: of rows and order.
        workers: processes of one thread.
        start: the teacher.
    """

    points: tuple[tuple[str, str], ...] = ((SMALL, STORIES), (HALF, DOLLY), (HALF, STORIES), (SMALL, DOLLY))
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    fractions: tuple[float, ...] = (0.1, 0.4, 1.0)
    rates: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {HALF: (3e-4, 1e-4, 1e-3), SMALL: (3e-3, 1e-3, 6e-3)}
    )
    is_tuned: bool = True
    tuning_fraction: float = 0.4
    steps: int = 128
    batch_size: int = 2
    length: int = 96
    train_rows: int = 256
    validation_rows: int = 24
    test_rows: int = 60
    prompts: int = 160
    answer_tokens: int = 128
    seed: int = 0
    workers: int = WORKERS
    start: Start = field(default_factory=Start)

    def jobs(self, student: str, text: str, rates: Mapping[str, float]) -> list[PointJob]:
        """The final runs of one point, each contender at its rate."""
        return [
            PointJob(name, fraction, rates[name], self.seed, False, student, text)
            for fraction in self.fractions
            for name in self.contenders
        ]

    def given_jobs(self, student: str, text: str) -> list[PointJob]:
        """What is asked of the untrained student; and of the teacher, where it is asked to follow instructions."""
        untrained = PointJob(UNTRAINED, 0.0, 0.0, self.seed, False, student, text)
        teacher = PointJob(TEACHER, 0.0, 0.0, self.seed, False, "none", text)  # one for all students
        return [untrained, teacher] if self.follows(text) else [untrained]

    def follows(self, text: str) -> bool:
        """Whether those who learn this text are asked to follow instructions: stories have no turns."""
        return bool(self.prompts) and text == DOLLY

    def tuning_jobs(self, student: str, text: str) -> list[PointJob]:
        """None where the grid has one rate; those of sft alone where the others take its rate."""
        grid = self.rates[student]
        # another seed than the final runs': nothing is tuned on their draw of rows
        return [
            PointJob(name, self.tuning_fraction, rate, self.seed + 1000, True, student, text)
            for name in (self.contenders if self.is_tuned else (BASELINE,))
            for rate in (grid if len(grid) > 1 else ())
        ]

    def runs(self) -> int:
        """How many there are in all, what is asked of an untrained student among them."""
        each, given = (
            len(self.contenders) * len(self.fractions),
            [job for p in self.points for job in self.given_jobs(*p)],
        )
        return len({job.key for job in given}) + sum(each + len(self.tuning_jobs(*point)) for point in self.points)

    def settings(self) -> dict[str, Any]:
        """What all runs of one file share; no path of this machine."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "start")}

    def caches(self) -> dict[str, tuple[CacheKind, Any]]:
        """Each once: its name, what it stores, and its tail policy."""
        plans = [CONTENDERS[name] for name in self.contenders]
        return {cache_name(plan): (plan.cache, plan.policy) for plan in plans if plan.cache}


SHORT = RealDistillConfig(
    points=((SMALL, STORIES), (HALF, DOLLY)), contenders=(BASELINE, "top8_bucket", "draws50"),
    rates={HALF: (1e-3, 3e-4), SMALL: (3e-3, 1e-3)}, is_tuned=False, steps=64, train_rows=128, test_rows=32, prompts=0, workers=1,
)  # fmt: skip
"""Half an hour of one core: three contenders, two points; two rates are tried with sft, and all take the better one."""
QUICK = replace(
    SHORT, points=((SMALL, STORIES),), contenders=(BASELINE, "top8_bucket"), fractions=(0.5, 1.0),
    rates={SMALL: (3e-3,)}, steps=2, length=24, train_rows=4, validation_rows=1, test_rows=4,
)  # fmt: skip
SIZES = {"full": RealDistillConfig(), "short": SHORT, "quick": QUICK}


def cache_name(plan: Method) -> str:
    """The folder of what a contender reads; empty where it reads nothing.

    Example:
        >>> cache_name(CONTENDERS["top8_spread"]), cache_name(CONTENDERS["draws50"]), cache_name(CONTENDERS["sft"])
        ('top8_spread', 'draws50', '')
    """
    if plan.cache is None:
        return ""
    return plan.cache.name if plan.cache.sampled else f"{plan.cache.name}_{plan.policy}"


def sized(size: str, start: Start, workers: int) -> RealDistillConfig:
    """``full``, ``short`` or ``quick``, from this model."""
    return replace(SIZES[size], start=start, workers=workers)
