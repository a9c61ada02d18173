"""``qtarget demo``: the two ends of the map of ``qtarget bench noise`` in minutes, with what was tuned there."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from qtarget.benchmarks.figure import regimes_figure, save_figure
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.runs import Cell, Job, NoiseWorker, Setting
from qtarget.benchmarks.pool import Progress, Workers, one_thread, quiet_libraries
from qtarget.benchmarks.seeds import over_seeds, paired_difference
from qtarget.benchmarks.tasks import make_base, task_set
from qtarget.core.errors import ConfigError
from qtarget.storage.files import write_text
from qtarget.storage.folders import DEMO, owned

BASELINE, ORACLE = "sft", "sft, marks left out"
REGIMES = {"most": "a base that knows most of the format", "none": "a base that has never seen it"}
TUNED = {
    "most": {
        "sft": (5e-4, 0.0),
        "sft, filtered rows": (5e-4, 0.5),
        "consensus": (1e-3, 1.0),
        "crossfit_consensus": (5e-4, 0.0),
        "target_sft": (5e-4, 0.1),
        "prior_surprise": (2e-3, 0.0),
        ORACLE: (1e-3, 0.0),
    },
    "none": {
        "sft": (2e-3, 0.0),
        "sft, filtered rows": (2e-3, 0.9),
        "consensus": (2e-3, 1.0),
        "crossfit_consensus": (2e-3, 0.0),
        "target_sft": (1e-3, 0.3),
        "prior_surprise": (1e-3, 0.0),
        ORACLE: (2e-3, 0.0),
    },
}
"""Base -> method -> learning rate and own hyper-parameter, as ``qtarget bench noise`` chose them on noisy validation rows
(``benchmarks/results/noise.json``, and ``demo_tuning.json`` for ``crossfit_consensus``; a test compares)."""
CAPTION = (
    "Large points: mean over seeds; small points: each seed; lines: smallest to largest seed (no confidence interval). "
    "Dashed: the base, untrained. Grey: an oracle that is told which tokens are noise. Rates were tuned on other noisy rows."
)


@dataclass(frozen=True)
class DemoConfig:
    """The defaults tell the story.

    Attributes:
        seeds: number of draws of noise and order, 0, 1, ...; all methods of a seed see the same.
        methods: of ``bench noise``; sft among them.
        kind, rate: of the noise: where ``TUNED`` was tuned.
        steps: optimizer steps of 16 rows.
        workers: processes of one thread each; the numbers do not depend on how many.
    """

    seeds: int = 3
    methods: tuple[str, ...] = tuple(TUNED["most"])
    kind: str = "random_tokens"
    rate: float = 0.4
    steps: int = 40
    workers: int = 2

    regimes: ClassVar[Mapping[str, str]] = REGIMES
    tuned: ClassVar[Mapping[str, Mapping[str, tuple[float, float]]]] = TUNED
    rates_are: ClassVar[str] = "as tuned on other noisy rows"
    caption: ClassVar[str] = CAPTION

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, self.workers) < 1:
            raise ConfigError(
                f"seeds {self.seeds}, steps {self.steps}, workers {self.workers}; expected at least 1 each"
            )
        if unknown := [name for name in self.methods if name not in self.tuned["most"]]:
            raise ConfigError(
                f"methods {', '.join(unknown)} are not among those that were tuned: {'; '.join(self.tuned['most'])}"
            )
        if BASELINE not in self.methods:
            raise ConfigError(f"methods lack {BASELINE}, which the others are compared with; add it")

    def jobs(self) -> Iterator[Job]:
        """Every run: base by base, seed by seed."""
        for base in self.regimes:
            for seed in range(self.seeds):
                for name in self.methods:
                    rate, value = self.tuned[base][name]
                    yield Job(Cell(base, self.kind, self.rate), name, rate, value, seed, tuning=False)

    def prepared(self, folder: Path) -> tuple[Any, ...]:
        """Makes the bases in ``folder``; the kind of worker that trains from them, and what one is made with."""
        task, setting = task_set("embedded", None), Setting("embedded", None, folder, self.steps)
        for base in self.regimes:
            make_base(task, base, folder, setting.start)
        return NoiseWorker, setting


def quick(config: DemoConfig) -> DemoConfig:
    """A few seconds' worth. For tests, not for conclusions."""
    return replace(config, methods=(BASELINE, "target_sft"), seeds=1, steps=6, workers=1)


def run_demo(config: DemoConfig, output: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Make the two bases, train every method on every seed, answer the held-out prompts, write numbers and picture.

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


def written(
    output: Path, measured: Callable[[], dict[str, Any]], drawn: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """What a demo measures, as numbers and picture in a folder that is held meanwhile.

    Raises:
        ConfigError: see ``run_demo``.
    """
    with owned(output, DEMO):
        results = measured()
        write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
        save_figure(drawn(results), output / "results.png")
    return results


def measure(config: DemoConfig, progress: Progress | None, begin: float) -> dict[str, Any]:
    """All runs of the demo; nothing is left on disk."""
    report = progress or (lambda done, total, text: None)
    jobs, done = list(config.jobs()), count(2)
    total = 1 + len(jobs)

    def advance(job: Job, _: Any) -> None:
        report(next(done), total, f"base that knows {job.cell.base}: {job.method}, seed {job.seed}")

    with quiet_libraries(), one_thread(), tempfile.TemporaryDirectory() as folder:
        report(0, total, "making the two bases")
        kind, *given = config.prepared(Path(folder))
        here = kind(*given)
        cells = {base: Cell(base, config.kind, config.rate) for base in config.regimes}
        bases = {
            base: {"untrained": here.test(here.base(base), cell), **here.base_knows(cell)}
            for base, cell in cells.items()
        }
        report(1, total, f"fine-tuning {len(jobs)} models")
        with Workers(min(config.workers, len(jobs)), kind, *given) as workers:
            found = dict(zip(jobs, workers.map(jobs, advance), strict=True))
    regimes = {
        base: facts | {"runs": {name: [found[job] for job in jobs if (job.cell.base, job.method) == (base, name)]
                                for name in config.methods}}
        for base, facts in bases.items()
    }  # fmt: skip
    for regime in regimes.values():
        regime["summary"] = summarize(regime["runs"])
    return {
        "benchmark": "demo",
        "config": asdict(config),
        "tuned": config.tuned,
        "bases": config.regimes,
        "rates_are": config.rates_are,
        "regimes": regimes,
        "finding": finding(regimes, f"{100 * config.rate:g} % {config.kind.replace('_', ' ')}"),
        "caption": config.caption,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_facts(),
        "versions": versions(),
    }


def picture(results: Mapping[str, Any]) -> Any:
    """The figure of ``results.json``."""
    panels = {
        results.get("bases", REGIMES)[base]: ({name: _percent(runs) for name, runs in regime["runs"].items()},
                        regime["untrained"]["accuracy_percent"])
        for base, regime in results["regimes"].items()
    }  # fmt: skip
    return regimes_figure(panels, results["finding"], results["caption"], baseline=BASELINE, oracle=ORACLE)


def _percent(runs: Sequence[Mapping[str, float]]) -> list[float]:
    return [run["accuracy_percent"] for run in runs]


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per method: range of the accuracy, and of its paired difference to the baseline; skills kept, where they were asked."""
    return {
        name: {
            "accuracy_percent": asdict(over_seeds(_percent(found))),
            "difference_to_sft_points": asdict(paired_difference(_percent(found), _percent(runs[BASELINE]))),
        }
        | (
            {"kept_percent": asdict(over_seeds([run["kept_percent"] for run in found]))}
            if "kept_percent" in found[0]
            else {}
        )
        for name, found in runs.items()
    }


def finding(regimes: Mapping[str, Mapping[str, Any]], noise: str) -> str:
    """One sentence: what sft does at both ends, what is best there, and who is never far behind.

    The oracle is nobody's choice, so it does not take part.
    """
    means = {
        base: {name: row["accuracy_percent"]["mean"] for name, row in regime["summary"].items() if name != ORACLE}
        for base, regime in regimes.items()
    }
    parts = [sentence(found, regimes[base]["untrained"]["accuracy_percent"]) for base, found in means.items()]
    behind = {
        name: max(max(found.values()) - found[name] for found in means.values()) for name in next(iter(means.values()))
    }
    steady = min(behind, key=lambda name: behind[name])
    return f"{noise}: {'; '.join(parts)}. {steady} is within {behind[steady]:.0f} points of the best for both"


def sentence(found: Mapping[str, float], untrained: float) -> str:
    """What becomes of one base.

    Example:
        >>> sentence({"sft": 44.3, "target_sft": 68.8}, 63.0)
        'sft takes a base from 63 to 44 %, target_sft to 69 %'
    """
    best = max(found, key=lambda name: found[name])
    other = "" if best == BASELINE else f", {best} to {found[best]:.0f} %"
    return f"{BASELINE} takes a base from {untrained:.0f} to {found[BASELINE]:.0f} %{other}"
