"""`qtarget bench distill --base smollm2`: real text, a real teacher, two students; how many of the rows does a student need?

The text is not the teacher's: answers that people wrote (dolly, in the model's chat template), and TinyStories. The teacher is
asked once, by `qtarget score`'s code; every student is trained by `QTargetTrainer`, an equal number of steps whatever the
fraction of rows. Measured on held-out rows: ``KL(teacher || student)`` over the whole vocabulary, and NLL.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qtarget.benchmarks.distill.data import CacheKind
from qtarget.benchmarks.distill.runs import BASELINE, METHODS, Job, Method, chosen_rows
from qtarget.benchmarks.finetune import Encoded, collate, hidden_states
from qtarget.benchmarks.machine import machine_facts, versions
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
from qtarget.benchmarks.real.demonstrations import WRITTEN, unpacked
from qtarget.benchmarks.real.distill_results import summarize
from qtarget.benchmarks.start import Scale, Start, claim
from qtarget.benchmarks.start import untrained as random_model
from qtarget.core.errors import ConfigError
from qtarget.core.shapes import Float, Tensor
from qtarget.scoring.cache.schema import MANIFEST, size_on_disk
from qtarget.storage.files import write_json
from qtarget.storage.folders import whole_folder

HALF, SMALL = "half", "small"
DOLLY, STORIES = "dolly", "stories"
UNTRAINED = "untrained"
SMALL_SCALE = Scale(width=256, layers=3, heads=4)
"""15 million parameters with a vocabulary of 49,152."""
ANSWER = (40, 240)
"""Characters of a human answer: fewest and most."""
AT_ONCE = 8
"""Rows of a forward pass."""
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
        each = len(self.contenders) * len(self.fractions) + 1
        return sum(each + len(self.tuning_jobs(*point)) for point in self.points)

    def settings(self) -> dict[str, Any]:
        """What all runs of one file share; no path of this machine."""
        return {name: value for name, value in asdict(self).items() if name not in ("workers", "start")}

    def caches(self) -> dict[str, tuple[CacheKind, Any]]:
        """Each once: its name, what it stores, and its tail policy."""
        plans = [CONTENDERS[name] for name in self.contenders]
        return {cache_name(plan): (plan.cache, plan.policy) for plan in plans if plan.cache}


SHORT = RealDistillConfig(
    points=((SMALL, STORIES), (HALF, DOLLY)), contenders=(BASELINE, "top8_bucket", "draws50"),
    rates={HALF: (1e-3, 3e-4), SMALL: (3e-3, 1e-3)}, is_tuned=False, steps=64, train_rows=128, test_rows=32, workers=1,
)  # fmt: skip
"""Half an hour of one core: three contenders, two points; two rates are tried with sft, and all take the better one."""
QUICK = replace(
    SHORT, points=((SMALL, STORIES),), contenders=(BASELINE, "top8_bucket"), fractions=(0.5, 1.0),
    rates={SMALL: (3e-3,)}, steps=2, length=24, train_rows=4, validation_rows=1, test_rows=4,
)  # fmt: skip
SIZES = {"full": RealDistillConfig(), "short": SHORT, "quick": QUICK}


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
        DataError: a text is missing.
    """
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
        "teacher": teacher, "points": points, "machine": machine_facts(), "versions": versions(),
    }  # fmt: skip
    with Workers(config.workers, RealDistillWorker, config, rows, folder) as workers:

        def done(job: Any) -> None:
            tuning = "tuning " if job.tuning else ""
            said = f"{job.method}, {job.fraction:g} of the rows of {job.text}, {job.student} student"
            progress(len(log.runs), total, f"{tuning}{said}")

        for student, text in config.points:
            rates, tuned = chosen_rates(config, student, text, workers, log, done)
            first = PointJob(UNTRAINED, 0.0, 0.0, config.seed, False, student, text)
            jobs = [first, *config.jobs(student, text, rates)]
            untrained, *found = workers.run(jobs, log, done)
            runs = {f"{job.method}|{job.fraction:g}": run for job, run in zip(jobs[1:], found, strict=True)}
            points.append(
                {"student": student, "text": text, "rates": rates, "tuned": tuned, UNTRAINED: untrained, "runs": runs}
            )
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


# -- text, teacher, students -------------------------------------------------------------------------------------


def real_rows(data: Path, text: str, config: RealDistillConfig) -> dict[str, list[dict[str, Any]]]:
    """Rows to train on, to tune by and to be tested by, as the trainer takes them; the same whatever the student.

    Raises:
        DataError: the text is missing.
        ConfigError: it has fewer rows than are asked for.
    """
    if text == DOLLY:
        found = json.loads(unpacked(data / WRITTEN["dolly"]))
        found = [row for row in found if not row["input"] and ANSWER[0] <= len(row["output"]) <= ANSWER[1]]
        rows = [in_turns(row["instruction"], row["output"]) for row in found]
    else:
        rows = [{"text": story} for story in json.loads(unpacked(data / "text_corpora" / "tinystories_1000.json.gz"))]
    sizes = {"train": config.train_rows, "validation": config.validation_rows, "test": config.test_rows}
    if len(rows) < sum(sizes.values()):
        raise ConfigError(
            f"{text} has {len(rows)} rows; {', '.join(f'{count} {n}' for n, count in sizes.items())} asked"
        )
    drawn = iter(Random(0).sample(rows, sum(sizes.values())))
    return {name: [next(drawn) for _ in range(count)] for name, count in sizes.items()}


def in_turns(question: str, answer: str) -> dict[str, Any]:
    """A row in chat form whose answer is trained.

    Example:
        >>> in_turns("Who?", "Me.")["completion"]
        [{'role': 'assistant', 'content': 'Me.'}]
    """
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def cache_name(plan: Method) -> str:
    """The folder of what a contender reads; empty where it reads nothing.

    Example:
        >>> cache_name(CONTENDERS["top8_spread"]), cache_name(CONTENDERS["draws50"]), cache_name(CONTENDERS["sft"])
        ('top8_spread', 'draws50', '')
    """
    if plan.cache is None:
        return ""
    return plan.cache.name if plan.cache.sampled else f"{plan.cache.name}_{plan.policy}"


def arguments(config: RealDistillConfig, folder: Path, **changes: Any) -> Any:
    """Settings of all trainings, and of the scoring that sees the same tokens."""
    from qtarget.integrations.sft.config import QTargetConfig

    return QTargetConfig(
        str(folder), max_steps=config.steps, per_device_train_batch_size=config.batch_size, max_length=config.length,
        lr_scheduler_type="linear", warmup_steps=0.1, weight_decay=0.0, logging_strategy="no", bf16=False,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, activation_checkpointing=False, **changes,
    )  # fmt: skip


def prepare(
    config: RealDistillConfig,
    rows: Mapping[str, Mapping[str, list[dict[str, Any]]]],
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Students, caches and held-out tokens in ``folder``, each unless it is there; what was found, by text."""
    for name in dict.fromkeys(name for name, _ in config.points):
        if not (folder / name).is_dir():
            say(f"making the {name} student")
            make_student(config.start, name, folder / name)
    facts: dict[str, Any] = {"students": {name: parameters(config.start, folder / name) for name, _ in config.points}}
    for text, parts in rows.items():
        if not (folder / text / "held_out.json").is_file():
            write_held_out(config, parts, folder / text)
        found: dict[str, dict[str, float]] = {}
        for name, (kind, policy) in config.caches().items():
            say(f"asking the teacher: {name} of {text}")
            found[name] = write_cache(config, parts["train"], kind, policy, folder / text / name)
        facts[text] = {"caches": found}
    return facts


def make_student(start: Start, name: str, folder: Path) -> None:
    """The first half of the teacher's layers between its own embeddings and its own last norm, or a small random model."""
    tokenizer = start.tokenizer()
    if name == HALF:
        model = start.load()
        count = model.config.num_hidden_layers // 2
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:count], count
    else:
        model = random_model(SMALL_SCALE, tokenizer)
    with whole_folder(folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)


def parameters(start: Start, folder: Path) -> int:
    """How many numbers a model has; tied ones once."""
    return start.load(folder).num_parameters()


def write_held_out(config: RealDistillConfig, parts: Mapping[str, list[dict[str, Any]]], folder: Path) -> None:
    """Held-out rows as ids, cut and masked as training does."""
    from datasets import Dataset

    from qtarget.integrations.sft.score import training_rows, untold

    found = {}
    for split in ("validation", "test"):
        with untold(True):
            job = training_rows(config.start.load(), arguments(config, folder), Dataset.from_list(parts[split]))
        found[split] = [[row["input_ids"], row["labels"]] for row in job.rows]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "held_out.json", found)


def write_cache(
    config: RealDistillConfig, rows: list[dict[str, Any]], kind: CacheKind, policy: Any, folder: Path
) -> dict[str, float]:
    """Ask the teacher about the training rows, unless it was; bytes a token of all files."""
    from datasets import Dataset

    from qtarget.integrations.sft.score import score, untold
    from qtarget.scoring.cache.reader import ReferenceCache

    if not (folder / MANIFEST).is_file():
        with untold(True):
            score(
                config.start.load(), arguments(config, folder), Dataset.from_list(rows), None,
                config.start.tokenizer(), directory=folder, top_k=kind.top_k, sampled=kind.sampled, model_id="teacher",
                progress=False, shard_rows=40, **({} if kind.sampled else {"tail_policy": policy}),
            )  # fmt: skip
    tokens = ReferenceCache.open(folder, verify=False).manifest.tokens
    return {"bytes_per_token": round(size_on_disk(folder) / tokens, 2), "tokens": tokens}


# -- runs --------------------------------------------------------------------------------------------------------


class RealDistillWorker:
    """Runs jobs; keeps held-out rows and what the teacher says of them."""

    def __init__(self, config: RealDistillConfig, rows: Mapping[str, Mapping[str, list[Any]]], folder: Path) -> None:
        self.config, self.rows, self.folder = config, rows, folder
        self.held_out = lru_cache(maxsize=None)(self._held_out)

    def __call__(self, job: PointJob) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        model = self.config.start.load(self.folder / job.student) if job.method == UNTRAINED else self.trained(job)
        found = measured(model.eval(), *self.held_out(job.text, "validation" if job.tuning else "test"))
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**found, **{name: round(value, 1) for name, value in spent.items()}}

    def trained(self, job: PointJob) -> Any:
        """The student after a run through the public trainer."""
        from datasets import Dataset

        from qtarget.integrations.sft.score import untold
        from qtarget.integrations.sft.trainer import QTargetTrainer

        plan, rows = CONTENDERS[job.method], self.rows[job.text]["train"]
        chosen = [rows[i] for i in chosen_rows(len(rows), job.fraction, job.seed)]
        cache = str(self.folder / job.text / cache_name(plan)) if plan.cache else None
        with TemporaryDirectory() as scratch, untold(True):  # that rows are cut is part of the setting
            args = arguments(
                self.config, Path(scratch), target=plan.target, target_kwargs=dict(plan.hyperparameters) or None,
                teacher_cache=cache, learning_rate=job.learning_rate, seed=job.seed,
            )  # fmt: skip
            student = str(self.folder / job.student)
            trainer = QTargetTrainer(student, args, None, Dataset.from_list(chosen))
            trainer.train()
        return trainer.model

    def _held_out(self, text: str, split: str) -> tuple[list[Encoded], list[Tensor], Tensor]:
        """Rows, the teacher's hidden states at their trained tokens, and its head."""
        found = json.loads((self.folder / text / "held_out.json").read_text(encoding="utf-8"))[split]
        rows = [encoded(*row) for row in found]
        teacher = self.config.start.load().eval()
        return rows, completion_states(teacher, rows), teacher.lm_head.weight.detach().clone()


def encoded(ids: list[int], labels: list[int]) -> Encoded:
    """A row whose trained tokens stand at its end; nothing predicts the first token of a text.

    Example:
        >>> encoded([5, 6, 7], [-100, -100, 7]).completion, encoded([5, 6, 7], [5, 6, 7]).completion
        ([7], [6, 7])
    """
    masked = max(1, sum(label == -100 for label in labels))
    return Encoded(ids[:masked], ids[masked:], [False] * (len(ids) - masked))


@torch.no_grad()
def completion_states(model: Any, rows: Sequence[Encoded]) -> list[Float[Tensor, "completion width"]]:
    """Last hidden states that predict each completion token, row by row."""
    out: list[Tensor] = []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        ids, labels = (tensor.to(model.device) for tensor in collate(part))
        out += hidden_states(model, ids)[labels >= 0].split([len(row.completion) for row in part])
    return out


@torch.no_grad()
def measured(model: Any, rows: Sequence[Encoded], states: Sequence[Tensor], head: Tensor) -> dict[str, list[float]]:
    """Of each row the means over its trained tokens, in nats: ``kl_to_teacher`` and ``nll`` of the student, ``teacher_nll``.

    Args:
        states, head: the teacher's, as ``completion_states`` gives them.
    """
    out: dict[str, list[float]] = {"kl_to_teacher": [], "nll": [], "teacher_nll": []}
    weight = model.get_output_embeddings().weight
    for row, mine, theirs in zip(rows, completion_states(model, rows), states, strict=True):
        student, teacher = ((at @ w.T).log_softmax(-1) for at, w in ((mine, weight), (theirs, head)))
        labels = torch.tensor(row.completion, device=student.device)[:, None]
        values = {
            "kl_to_teacher": (teacher.exp() * (teacher - student)).sum(-1),
            "nll": -student.gather(-1, labels),
            "teacher_nll": -teacher.gather(-1, labels),
        }
        for name, value in values.items():
            out[name].append(round(float(value.mean()), 5))
    return out


def sized(size: str, start: Start, workers: int) -> RealDistillConfig:
    """``full``, ``short`` or ``quick``, from this model."""
    return replace(SIZES[size], start=start, workers=workers)
