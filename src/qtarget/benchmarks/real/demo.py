"""``qtarget demo --real``: the two ends of the map on a real model, in minutes: as it is, and after a few steps on clean rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from qtarget.benchmarks.demo.bench import ORACLE, DemoConfig
from qtarget.benchmarks.noise.runs import Setting
from qtarget.benchmarks.real.bench import RATE
from qtarget.benchmarks.real.worker import RealWorker, Scope, teach_by_adapters, with_adapters
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, embedded_tasks

TAUGHT = "taught"
"""Name of the folder of the base that has seen clean rows."""
SAME = {
    "sft": (RATE, 0.0),
    "sft, filtered rows": (RATE, 0.7),
    "consensus": (RATE, 1.0),
    "crossfit_consensus": (RATE, 0.0),
    ORACLE: (RATE, 0.0),
}
"""Method -> learning rate and own hyper-parameter: the first of each grid of `bench noise`, tuned on nothing."""


@dataclass(frozen=True)
class RealDemoConfig(DemoConfig):
    """The demo on the model of ``qtarget bench base``.

    Attributes:
        folder: of the model.
        scope: of rows and adapters.
        taught_steps: on clean rows, for the base that knows most of the format.
    """

    seeds: int = 1
    methods: tuple[str, ...] = tuple(SAME)
    steps: int = 400 // BATCH_SIZE
    folder: str | None = None
    scope: Scope = field(
        default_factory=lambda: Scope("instruction", train_rows=400, test_rows=60, texts=0, dtype="bfloat16")
    )
    taught_steps: int = 25

    regimes: ClassVar[Mapping[str, str]] = {
        "most": "SmolLM2-135M after some steps on clean rows",
        "none": "SmolLM2-135M as it is",
    }
    tuned: ClassVar[Mapping[str, Mapping[str, tuple[float, float]]]] = {"most": SAME, "none": SAME}
    rates_are: ClassVar[str] = f"{RATE:g} for all, tuned on nothing"
    caption: ClassVar[str] = (
        "Points: one seed each; one seed ranks nothing. Dashed: the base, untrained. Grey: an oracle that is told which tokens "
        f"are noise. Four-bit weights are part of the base; one learning rate, {RATE:g}, for all."
    )

    def prepared(self, folder: Path) -> tuple[Any, ...]:
        """Teaches the base that knows most; the other is the model itself."""
        start = Start(self.folder, learning_rate=RATE)
        rows = embedded_tasks(self.scope.train_rows).warmup
        teach_by_adapters(start, rows, self.taught_steps, self.scope.rank, folder / TAUGHT)
        return RealDemoWorker, Setting("embedded", None, folder, self.steps, start), self.scope


class RealDemoWorker(RealWorker):
    """Runs jobs from two bases: the start, and the start after clean rows."""

    def base(self, name: str) -> Any:
        """A new copy, with adapters that change nothing yet."""
        folder = self.setting.bases / TAUGHT if name == "most" else None
        return with_adapters(self.setting.start.load(folder, self.scope.dtype), self.scope.rank)


def quick(config: RealDemoConfig) -> RealDemoConfig:
    """A minute or two. For tests, not for conclusions."""
    small = replace(config.scope, train_rows=48, test_rows=8)
    return replace(config, methods=("sft", "consensus"), seeds=1, steps=3, workers=1, scope=small, taught_steps=3)
