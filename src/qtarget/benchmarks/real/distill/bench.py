"""`qtarget bench distill --base smollm2`: real text, a real teacher, two students; how many of the rows does a student need?

The text is not the teacher's: answers that people wrote (dolly, in the model's chat template), and TinyStories. The teacher is
asked once, by `qtarget score`'s code; every student is trained by `QTargetTrainer`, an equal number of steps whatever the
fraction of rows. Measured on held-out rows: ``KL(teacher || student)`` over the whole vocabulary, and NLL.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.pool import (
    Progress,
    RunLog,
    Workers,
    check_settings,
    one_thread,
    quiet_libraries,
    save_results,
)
from qtarget.benchmarks.real.distill.config import (
    BASELINE,
    CONTENDERS,
    RealDistillConfig,
    cache_name,
)
from qtarget.benchmarks.real.distill.prepared import prepare
from qtarget.benchmarks.real.distill.results import summarize
from qtarget.benchmarks.real.distill.runs import RealDistillWorker
from qtarget.benchmarks.real.distill.texts import real_rows
from qtarget.benchmarks.real.instructions import asked_of, check_ready, instruction_rows
from qtarget.benchmarks.start import claim


def run_real_distill(
    config: RealDistillConfig, data: Path, output: Path, *, resume: bool, progress: Progress
) -> dict[str, Any]:
    """Ask the teacher, train and ask all students; results are saved after each point.

    Args:
        data: folder of real texts.
        output: JSON; finished runs stand beside it in ``.runs.jsonl``, caches and untrained students in ``.work``.
        resume: go on with what is finished there.
        progress: called with runs done, runs in all, and what was done last.

    Raises:
        ConfigError: runs are there and ``resume`` is false, or they are of other settings.
        DataError, MissingDependencyError: a text is missing; or what judges instruction following is.
    """
    if config.prompts:
        check_ready(data)
    instructions = instruction_rows(data, config.prompts) if config.prompts else []
    rows = {text: real_rows(data, text, config) for text in dict.fromkeys(text for _, text in config.points)}
    settings = config.settings()
    check_settings(output, resume, settings)
    folder = output.with_suffix(".work")
    claim(folder, {**settings, "base": str(config.start.path.resolve()), "data": str(data.resolve())})
    log = RunLog(output.with_suffix(".runs.jsonl"), resume)
    total = config.runs()
    with quiet_libraries(), one_thread():
        teacher = prepare(config, rows, folder, lambda text: progress(len(log.runs), total, text))
    points: list[dict[str, Any]] = []
    results = {
        "benchmark": "distill on a real model", "config": settings, "base": "SmolLM2-135M-Instruct, four-bit weights (Q4_1)",
        "teacher": teacher, "asked": asked_of(instructions), "points": points, "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    with Workers(config.workers, RealDistillWorker, config, rows, instructions, folder) as workers:

        def done(job: Any) -> None:
            tuning = "tuning " if job.tuning else ""
            said = f"{job.method}, {job.fraction:g} of the rows of {job.text}, {job.student} student"
            progress(len(log.runs), total, f"{tuning}{said}")

        for student, text in config.points:
            rates, tuned = chosen_rates(config, student, text, workers, log, done)
            given, jobs = config.given_jobs(student, text), config.jobs(student, text, rates)
            before = {job.method: run for job, run in zip(given, workers.run(given, log, done), strict=True)}
            found = workers.run(jobs, log, done)
            runs = {f"{job.method}|{job.fraction:g}": run for job, run in zip(jobs, found, strict=True)}
            points.append({"student": student, "text": text, "rates": rates, "tuned": tuned, **before, "runs": runs})
            results["summary"] = summarize(results, {name: cache_name(CONTENDERS[name]) for name in config.contenders})
            save_results(output, results)
    return results


def chosen_rates(
    config: RealDistillConfig, student: str, text: str, workers: Workers, log: RunLog, done: Callable[[Any], None]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The rate of each contender, and its KL on validation rows by rate; of equals the grid's first."""
    jobs = config.tuning_jobs(student, text)
    tuned: dict[str, dict[str, float]] = {}
    for job, run in zip(jobs, workers.run(jobs, log, done), strict=True):
        kl = run["kl_to_teacher"]
        tuned.setdefault(job.method, {})[f"{job.learning_rate:g}"] = round(sum(kl) / len(kl), 5)
    best = {name: float(min(found, key=lambda rate: found[rate])) for name, found in tuned.items()}
    given = best.get(BASELINE, config.rates[student][0])
    return {name: best.get(name, given) for name in config.contenders}, tuned
