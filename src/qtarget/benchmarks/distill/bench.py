"""`qtarget bench distill`: how much of the data does a student need when it sees the teacher's distribution?

The protocol, the same for every method: the student is the embedded base; it trains on text that the teacher wrote, an
equal number of steps whatever the fraction of rows. Each method tunes its learning rate on validation prompts, at
``tuning_fraction`` with a seed of its own; with the chosen rate it is run on ``seeds`` draws of rows and order, and only
then are the test prompts asked. Every number about the teacher comes out of the files of a cache.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtarget.benchmarks.distill.data import Sizes, percent, prepare
from qtarget.benchmarks.distill.results import CAPTION, summarize
from qtarget.benchmarks.distill.runs import BASELINE, FULL_LOGITS, WITHOUT_ORACLES, DistillWorker, Job, method
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import WORKERS, Progress, RunLog, Workers, one_thread, quiet_libraries
from qtarget.benchmarks.start import Start
from qtarget.core.errors import ConfigError
from qtarget.storage.files import write_json

# beyond the seeds of the final runs: nothing is tuned on their draws
TUNING_SEED = 1000


@dataclass(frozen=True)
class DistillConfig:
    """Defaults are the full setting.

    Attributes:
        methods: names; sft and distillation are always among them.
        fractions: of the training rows.
        seeds: draws of rows and order of the final runs.
        learning_rates: the grid; all methods share it, and of rates that do equally well the first is taken.
        tuning_fraction: of the rows, when the rate is chosen.
        steps, batch_size: of every run, whatever the fraction.
        workers: processes of one thread.
        start: the student, and what the teacher is made of.
    """

    methods: tuple[str, ...] = WITHOUT_ORACLES
    fractions: tuple[float, ...] = (0.1, 0.2, 0.4, 0.7, 1.0)
    seeds: int = 5
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    tuning_fraction: float = 0.4
    steps: int = 80
    batch_size: int = 8
    train_rows: int = 160
    validation_rows: int = 200
    test_rows: int = 300
    teacher_steps: int = 500
    workers: int = WORKERS
    start: Start = field(default_factory=Start)

    def __post_init__(self) -> None:
        counts = (
            "seeds", "steps", "batch_size", "train_rows", "validation_rows", "test_rows", "teacher_steps", "workers"
        )  # fmt: skip
        if min(getattr(self, name) for name in counts) < 1:
            raise ConfigError(f"expected at least 1 each: {', '.join(f'{n} {getattr(self, n)}' for n in counts)}")
        for name in self.methods:
            method(name)
        if missing := {BASELINE, FULL_LOGITS} - set(self.methods):
            raise ConfigError(
                f"{' and '.join(sorted(missing))}: the others are compared with it; add it to the methods"
            )
        if sorted(set(self.fractions)) != list(self.fractions) or self.fractions[-1] != 1 or self.fractions[0] <= 0:
            raise ConfigError(f"fractions {self.fractions}; expected ascending ones above 0 that end with 1")

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.train_rows, self.validation_rows, self.test_rows, self.teacher_steps)


def run_distill(config: DistillConfig, output: Path, *, resume: bool, progress: Progress) -> dict[str, Any]:
    """Make the teacher and its caches, tune, run, and sum up.

    Args:
        output: JSON; the finished runs stand beside it in ``.runs.jsonl``, teacher and caches in ``.work``.
        resume: go on with what is finished there.
        progress: called with runs done, runs in all, and what was done last.

    Raises:
        ConfigError: runs are there and ``resume`` is false, or they are of other settings.
    """
    begin = time.perf_counter()
    log = RunLog(output.with_suffix(".runs.jsonl"), resume)
    folder = work_folder(config, output.with_suffix(".work"), resume)
    grid = len(config.learning_rates)
    tuning = len(config.methods) * grid if grid > 1 else 0
    total = tuning + len(config.methods) * len(config.fractions) * config.seeds
    kinds = dict.fromkeys(kind for name in config.methods if (kind := method(name).cache))
    with quiet_libraries(), one_thread():
        facts = prepare(
            config.sizes, list(kinds), folder, config.start, lambda text: progress(len(log.runs), total, text)
        )
    shared = config.sizes, folder, config.steps, config.batch_size, config.start
    with Workers(config.workers, DistillWorker, *shared) as workers:

        def done(job: Any) -> None:
            progress(
                len(log.runs), total, f"{'tuning ' if job.tuning else ''}{job.method}, {job.fraction:g} of the rows"
            )

        rates, tuned = chosen_rates(config, workers, log, done)
        jobs = [
            Job(name, fraction, rates[name], seed, False)
            for seed in range(config.seeds)
            for fraction in config.fractions
            for name in config.methods
        ]
        found = workers.run(jobs, log, done)
    runs = {(job.method, job.fraction, job.seed): run for job, run in zip(jobs, found, strict=True)}
    return {
        "benchmark": "distill",
        "config": asdict(config),
        "teacher": facts,
        **summarize(config.methods, config.fractions, config.seeds, runs, facts["caches"], rates, tuned),
        "runs": {"|".join(map(str, key)): run for key, run in runs.items()},
        "interval": CAPTION,
        "seconds": round(time.perf_counter() - begin, 1),
        "machine": machine_facts(),
        "versions": versions(),
    }


def work_folder(config: DistillConfig, folder: Path, resume: bool) -> Path:
    """The folder of teacher and caches; an earlier one is kept on resuming, else made anew.

    Raises:
        ConfigError: it is of other settings, or not of this benchmark.
    """
    # the number of workers changes no number, so another one may go on
    marker, settings = folder / "settings.json", json.loads(json.dumps(asdict(replace(config, workers=1))))
    if folder.exists() and not marker.is_file():
        raise ConfigError(f"{folder} is not of this benchmark; choose another --output")
    if folder.exists() and resume and json.loads(marker.read_text()) != settings:
        raise ConfigError(f"{folder} was made with other settings; leave --resume out, or choose another --output")
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, settings)
    return folder


def chosen_rates(
    config: DistillConfig, workers: Workers, log: RunLog, done: Callable[[Any], None]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The learning rate of each method, and percent on validation prompts by rate; of equals the grid's first."""
    if len(config.learning_rates) == 1:
        return dict.fromkeys(config.methods, config.learning_rates[0]), {}
    jobs = [
        Job(name, config.tuning_fraction, rate, TUNING_SEED, True)
        for name in config.methods
        for rate in config.learning_rates
    ]
    scores: dict[str, dict[str, float]] = {name: {} for name in config.methods}
    for job, run in zip(jobs, workers.run(jobs, log, done), strict=True):
        scores[job.method][str(job.learning_rate)] = percent([answer == "1" for answer in run["answered"]])
    best = {name: max(found, key=lambda rate: found[rate]) for name, found in scores.items()}
    return {name: float(rate) for name, rate in best.items()}, scores


def long(config: DistillConfig) -> DistillConfig:
    """Steps enough that rows are what is scarce: one method of each kind, in about half an hour."""
    return replace(
        config, methods=(BASELINE, FULL_LOGITS, "top8_bucket", "draws50", "target_sft_0.5", "target_sft_0.7", "reverse_kl",
        "generalized_jsd"), steps=300, learning_rates=(5e-4, 2.5e-4, 1e-3),
    )  # fmt: skip


def quick(config: DistillConfig) -> DistillConfig:
    """Less than half a minute: enough to see an ordering with a wide margin, not for conclusions."""
    return replace(
        config, methods=(BASELINE, FULL_LOGITS, "top8_bucket"), fractions=(0.1, 1.0), seeds=1, learning_rates=(2e-3,),
        steps=40, validation_rows=20, test_rows=100, teacher_steps=80,
    )  # fmt: skip
