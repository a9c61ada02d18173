"""`qtarget bench prior`: is a flawed prior amplified, and does the guard prevent it without giving noise its weight back?

A base that knows the format is taught one thing wrong, and confidently. Clean demonstrations correct it, in two doses. Every
prior-based target is trained with and without `qtarget.Guarded`; what the guard costs is measured on a base without flaw,
with clean rows and with random wrong tokens. On that base a few rows are right in another language as well, and it is asked in
that language: what doubts labels must not silence a minority. One recipe for all, chosen on plain SFT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from qtarget.benchmarks.finetune import Recipe, encode, fine_tune
from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.benchmarks.noise.crossfitting import crossfit_of, with_crossfit
from qtarget.benchmarks.noise.runs import Cell, Material, accuracy, in_minority, known_of, noisy_rows
from qtarget.benchmarks.pool import (
    WORKERS,
    Progress,
    RunLog,
    Workers,
    check_settings,
    one_thread,
    quiet_libraries,
    save_results,
)
from qtarget.benchmarks.prior import facts
from qtarget.benchmarks.prior.results import summarize
from qtarget.benchmarks.start import Start, claim
from qtarget.benchmarks.tasks import BATCH_SIZE, Row, TaskSet, embedded_tasks, make_base, teach
from qtarget.composed.guarded import Guarded
from qtarget.core.errors import ConfigError
from qtarget.core.types import WITNESS_FIELDS, Target
from qtarget.data import tasks
from qtarget.data.noise import inject_noise
from qtarget.data.tasks.skills import MONTHS
from qtarget.registry import get_target
from qtarget.storage.models import save_whole

BASE = "most"
FLAW_STEPS = 40
ASKED = 100
"""Test problems of the flawed skill."""


def smallest(row: Row) -> str:
    """The smallest number in place of the largest: a skill learnt wrong."""
    return min(character for character in row["prompt"] if character.isdigit())


def always_may(row: Row) -> str:
    """May, whatever the month: a biased token."""
    return next(row["answer"].replace(month, "May") for month in MONTHS if month in row["answer"])


FLAWS: Mapping[str, tuple[str, Callable[[Row], str]]] = {
    "wrong skill": ("maximum", smallest),
    "biased token": ("date_format", always_may),
    "wrong fact": (facts.SKILL, facts.next_capital),
}
"""Flaw -> the skill it spoils, and the wrong answer to a row. Facts are for a model that knows any."""
TARGETS: Mapping[str, dict[str, float]] = {
    "sft": {}, "prior_surprise": {}, "dft": {}, "sft_kl": {"kl_weight": 0.3}, "asft": {"kl_weight": 0.2},
    "target_sft": {"eta": 0.3}, "hybrid_distillation": {"teacher_weight": 0.5}, "consensus": {}, "crossfit_consensus": {},
}  # fmt: skip
GUARDED = ("dft", "sft_kl", "asft", "target_sft", "hybrid_distillation", "consensus", "crossfit_consensus")
MINORITY = "minority"
"""In the place of a flaw: none, and a share ``dose`` of the rows is right in another language."""


@dataclass(frozen=True)
class PriorConfig:
    """Defaults are the full setting.

    Attributes:
        targets: names; those in ``GUARDED`` are also run with the guard.
        flaws: planted one at a time.
        doses: share of the flawed skill's demonstrations that are there.
        noise_rate: of random tokens, on the base without flaw.
        with_sound: whether the base without flaw is run, too.
        minority: share of rows in another language, on the base without flaw; 0 leaves that point out.
        seeds, steps, workers, start: as in ``NoiseConfig``; the learning rate is the start's.
    """

    targets: tuple[str, ...] = tuple(TARGETS)
    flaws: tuple[str, ...] = ("wrong skill", "biased token")
    doses: tuple[float, ...] = (1.0, 0.25)
    noise_rate: float = 0.2
    with_sound: bool = True
    minority: float = 0.1
    seeds: int = 5
    steps: int = 40
    workers: int = WORKERS
    start: Start = field(default_factory=Start)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise ConfigError(
                f"targets {', '.join(unknown)} are not part of this benchmark; known: {', '.join(TARGETS)}"
            )
        if "sft" not in self.targets:
            raise ConfigError("what a target corrects is compared with what sft corrects; add sft")

    def conditions(self) -> list[Condition]:
        """Flaws by dose, then those without flaw."""
        flawed = [Condition(flaw, dose, 0.0) for flaw in self.flaws for dose in self.doses]
        sound = [Condition("none", 1.0, 0.0), Condition("none", 1.0, self.noise_rate)]
        sound += [Condition(MINORITY, self.minority, 0.0)] if self.minority else []
        return flawed + sound if self.with_sound else flawed

    def fixed(self) -> dict[str, Any]:
        """What all runs of one file share."""
        return {"steps": self.steps, "start": asdict(self.start)}

    def of_bases(self) -> dict[str, Any]:
        """What the bases are made of, which runs share and a later call takes again."""
        return {"tasks": "embedded", "start": asdict(self.start)}

    def methods(self) -> list[tuple[str, bool]]:
        """Target and whether it is guarded."""
        return [(name, guard) for name in self.targets for guard in ((False, True) if name in GUARDED else (False,))]


QUICK = PriorConfig(
    targets=("sft", "asft"), flaws=("wrong skill",), doses=(1.0,), minority=0.0, seeds=1, steps=20, workers=1
)
"""For continuous integration."""


@dataclass(frozen=True)
class Condition:
    """What is wrong with base and rows; ``flaw`` is ``none`` for a sound base, or ``minority``."""

    flaw: str
    dose: float
    noise_rate: float


@dataclass(frozen=True)
class PriorJob:
    """One run."""

    condition: Condition
    target: str
    guard: bool
    seed: int

    @property
    def key(self) -> str:
        """Names the run in the file of finished runs."""
        return "|".join(map(str, (*asdict(self.condition).values(), self.target, self.guard, self.seed)))


class PriorWorker:
    """Runs jobs; keeps rows and the base's numbers between them."""

    asked = ASKED

    def __init__(self, config: PriorConfig, bases: Path) -> None:
        self.config, self.bases, self.task = config, bases, embedded_tasks()
        self.tokenizer = config.start.tokenizer()
        self.material = lru_cache(maxsize=4)(self._material)
        self.judged = lru_cache(maxsize=2)(self._judged)

    def __call__(self, job: PriorJob) -> dict[str, float | None]:
        target = build(job.target, job.guard)
        judged = bool(target.needs.reference & set(WITNESS_FIELDS))
        material = (self.judged if judged else self.material)(job.condition, job.seed)
        model = self.base(job.condition.flaw)
        recipe = Recipe(self.config.start.learning_rate, BATCH_SIZE, self.config.steps, job.seed)
        needs = target.needs
        trained = fine_tune(
            model, material.rows, target, recipe, reference=material.known if needs.reference else None,
            teacher=material.known if needs.teacher else None,
        )  # fmt: skip
        return {**self.answers(model, job.condition.flaw), "noise_share": trained.noise_share}

    def base(self, flaw: str) -> Any:
        """The base with this flaw, from its folder; made where there is none."""
        return self.config.start.load(flawed_base(self.task, flaw, self.bases, self.config.start))

    def _material(self, condition: Condition, seed: int) -> Material:
        rows = dosed(self.task.train, condition, seed)
        if condition.flaw == MINORITY:
            rows = noisy_rows(rows, Cell(BASE, MINORITY, condition.dose), seed, self.tokenizer)
        if condition.noise_rate:
            rows = inject_noise(
                rows, kind="random_tokens", rate=condition.noise_rate, seed=seed, tokenizer=self.tokenizer
            )
        encoded = encode(self.tokenizer, rows)
        return Material(encoded, known_of(self.base(condition.flaw), encoded))

    def _judged(self, condition: Condition, seed: int) -> Material:
        """The material with what copies say that have not seen each row's prompt; they begin as the base, flaw and all."""
        material, config = self.material(condition, seed), self.config
        recipe = Recipe(config.start.learning_rate, BATCH_SIZE, config.steps, seed)

        def base() -> Any:
            return self.base(condition.flaw)

        told = crossfit_of(material.rows, base, recipe, other_prompts=False)
        known, _ = with_crossfit(material.rows, material.known, told, base)
        return Material(material.rows, known)

    def answers(self, model: Any, flaw: str) -> dict[str, float]:
        """Percent of all prompts answered right; of the flawed skill's problems, right and as the flaw would; of a minority's."""
        found = {"accuracy_percent": accuracy(model, self.tokenizer, self.task.test)}
        if flaw == MINORITY:
            asked = [in_minority(row) for row in self.task.test]
            found["minority_percent"] = accuracy(model, self.tokenizer, asked)
        if flaw in FLAWS:
            skill, wrong = FLAWS[flaw]
            rows = asked_problems(skill)[: self.asked]
            found["corrected_percent"] = accuracy(model, self.tokenizer, rows)
            found["flawed_percent"] = accuracy(model, self.tokenizer, [{**row, "answer": wrong(row)} for row in rows])
        return found


def build(name: str, guard: bool) -> Target:
    """The target with the hyper-parameter that this benchmark gives it."""
    target = get_target(name, **TARGETS[name])
    return Guarded(target) if guard else target


def dosed(rows: Sequence[Row], condition: Condition, seed: int) -> list[Row]:
    """The rows, with only a share of those of the flawed skill."""
    if condition.flaw not in FLAWS:
        return [dict(row) for row in rows]
    skill = FLAWS[condition.flaw][0]
    correcting = [index for index, row in enumerate(rows) if row["skill"] == skill]
    kept = set(Random(seed).sample(correcting, round(condition.dose * len(correcting))))
    return [dict(row) for index, row in enumerate(rows) if row["skill"] != skill or index in kept]


def asked_problems(skill: str) -> list[Row]:
    """Test problems of one skill whose flawed answer is another one than the right one."""
    if skill == facts.SKILL:
        return facts.asked_facts()
    random, wrong = Random(f"asked-{skill}"), next(answer for name, answer in FLAWS.values() if name == skill)
    # more than are asked: where the flawed answer is the right one (a date in May) the problem tells nothing
    drawn = (tasks.demonstration(tasks.sample_problem_in(skill, "test", random), random) for _ in range(3 * ASKED))
    return [row for row in drawn if wrong(row) != row["answer"]][:ASKED]


def flawed_base(task: TaskSet, flaw: str, folder: Path, start: Start) -> Path:
    """The folder of the base with a flaw, made once: it learns the wrong answers amid right ones of all other skills."""
    sound = make_base(task, BASE, folder, start)
    if flaw not in FLAWS:
        return sound
    path = folder / f"flawed-{flaw.replace(' ', '-')}"
    if (path / "config.json").is_file():
        return path
    skill, wrong = FLAWS[flaw]
    rows = [spoilt(row, wrong(row)) if row["skill"] == skill else row for row in task.warmup]
    model = start.load(sound)
    teach(model, start, rows, FLAW_STEPS, seed=1)
    save_whole(model, path)
    return path


def spoilt(row: Row, answer: str) -> Row:
    """The row with another answer between its brackets."""
    return {**row, "completion": row["completion"].replace(f"[{row['answer']}]", f"[{answer}]"), "answer": answer}


def run_prior(
    config: PriorConfig, output: Path, *, resume: bool, progress: Progress, worker: type[PriorWorker] = PriorWorker
) -> dict[str, Any]:
    """Run all conditions; results are saved after each.

    Args:
        output: JSON; finished runs stand beside it in ``.runs.jsonl``, bases in ``.bases``.
        progress: called with runs done, runs in all, and what was done last.
        worker: runs the jobs.
    """
    check_settings(output, resume, config.fixed())
    bases = output.with_suffix(".bases")
    claim(bases, config.of_bases())
    log = RunLog(output.with_suffix(".runs.jsonl"), resume)
    conditions: list[dict[str, Any]] = []
    results = {
        "benchmark": "prior", "config": asdict(config), "untrained": {}, "conditions": conditions,
        "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    total = len(config.conditions()) * len(config.methods()) * config.seeds
    with quiet_libraries(), one_thread():
        here = worker(config, bases)
        for flaw in dict.fromkeys(condition.flaw for condition in config.conditions()):
            progress(len(log.runs), total, f"making the base, flaw: {flaw}")
            results["untrained"][flaw] = here.answers(here.base(flaw), flaw)
    with Workers(config.workers, worker, config, bases) as workers:
        for condition in config.conditions():

            def done(job: Any) -> None:
                guard = ", guarded" if job.guard else ""
                progress(len(log.runs), total, f"{job.condition.flaw}: {job.target}{guard}, seed {job.seed}")

            methods = config.methods()
            jobs = [PriorJob(condition, *method, seed) for method in methods for seed in range(config.seeds)]
            found = workers.run(jobs, log, done)
            runs = {
                method_name(*method): found[i * config.seeds : (i + 1) * config.seeds]
                for i, method in enumerate(methods)
            }
            conditions.append({**asdict(condition), "runs": runs})
            results["summary"] = summarize(results)
            save_results(output, results)
    return results


def method_name(target: str, guard: bool) -> str:
    """As in the table."""
    return f"{target}, guarded" if guard else target
