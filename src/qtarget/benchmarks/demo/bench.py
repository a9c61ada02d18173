"""``qtarget demo``: several targets on the same noisy demonstrations, counted on clean held-out prompts."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

from qtarget.benchmarks.demo.runs import BASELINE, DemoConfig, DemoRuns, Job
from qtarget.benchmarks.figure import comparison_figure, save_figure
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import Progress, Workers, one_thread, quiet_libraries
from qtarget.benchmarks.seeds import finding, over_seeds, paired_difference
from qtarget.storage.files import write_text
from qtarget.storage.folders import DEMO, owned

CAPTION = (
    "Large points: mean over seeds; small points: each seed; lines: smallest to largest seed (no confidence "
    "interval). A seed sets the noise and the order of the rows; within a seed all targets see the same."
)


def quick(config: DemoConfig) -> DemoConfig:
    """A few seconds' worth: one seed, two targets, few rows. For tests, not for conclusions."""
    return replace(
        config, targets=("sft", "asft"), seeds=1, train_rows=48, test_rows=18, kept_rows=6, epochs=1, workers=1
    )


def run_demo(config: DemoConfig, output: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Score the base, train every target on every seed, answer the held-out prompts, write numbers and picture.

    Args:
        output: gets ``results.json`` and ``results.png``; earlier ones are replaced. All else is temporary.
        progress: called with steps done, steps in all, and what was done last.

    Returns:
        What ``results.json`` holds.

    Raises:
        ConfigError: ``output`` is somebody else's, or another process writes there.
    """
    begin, output = time.perf_counter(), Path(output)
    with owned(output, DEMO):
        results = measure(config, progress, begin)
        write_results(results, output)
    return results


def measure(config: DemoConfig, progress: Progress | None, begin: float) -> dict[str, Any]:
    """All runs of the demo; nothing is left on disk."""
    report = progress or (lambda done, total, text: None)
    jobs = [(name, seed) for seed in range(config.seeds) for name in config.targets]
    total = 2 + len(jobs)
    done = count(3)

    def advance(job: Job, _: dict[str, float]) -> None:
        report(next(done), total, f"{job[0]}, seed {job[1]}")

    with quiet_libraries(), one_thread(), tempfile.TemporaryDirectory() as folder:
        bench = DemoRuns(config, Path(folder))
        report(0, total, "scoring the base model")
        scoring = bench.score_base()
        report(1, total, "answering with the untrained model")
        untrained = bench.evaluate(bench.base_model())
        report(2, total, f"training {len(jobs)} models")
        with Workers(min(config.workers, len(jobs)), DemoRuns, config, bench.folder) as workers:
            found = dict(zip(jobs, workers.map(jobs, advance), strict=True))
    runs = {name: [{"seed": seed} | found[name, seed] for seed in range(config.seeds)] for name in config.targets}
    return {
        "benchmark": "demo",
        "config": asdict(config),
        "untrained": untrained,
        "runs": runs,
        "summary": summarize(runs),
        "finding": finding(accuracies(runs), noise_words(config)),
        "interval": CAPTION,
        "scoring": scoring,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_facts(),
        "versions": versions(),
    }


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """``results.json`` and the picture drawn from it."""
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    untrained = results["untrained"]["accuracy_percent"]
    figure = comparison_figure(accuracies(results["runs"]), untrained, results["finding"], results["interval"])
    save_figure(figure, output / "results.png")


def accuracies(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    """Target -> percent, one number a seed."""
    return {name: [run["accuracy_percent"] for run in found] for name, found in runs.items()}


def summarize(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per target: range of the accuracy, range of its paired difference to the baseline, mean seconds of training."""
    values = accuracies(runs)
    return {
        name: {
            "accuracy_percent": asdict(over_seeds(values[name])),
            "difference_to_sft_points": asdict(paired_difference(values[name], values[BASELINE])),
            "kept_percent": asdict(over_seeds([run["kept_percent"] for run in found])),
            "training_seconds": round(over_seeds([run["training_seconds"] for run in found]).mean, 2),
        }
        for name, found in runs.items()
    }


def noise_words(config: DemoConfig) -> str:
    """The noise in words.

    Example:
        >>> noise_words(DemoConfig())
        '20 % random tokens'
    """
    return f"{100 * config.rate:g} % {config.kind.replace('_', ' ')}"
