"""One run of `bench noise`: rows with noise, a base, a method, a recipe; what the model can do afterwards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from qtarget.benchmarks.finetune import Encoded, Recipe, completion_log_probs, encode, fine_tune, of_labels
from qtarget.benchmarks.generation import accuracy_percent, greedy_completions
from qtarget.benchmarks.noise.crossfitting import Judged, crossfit_of, forward_steps, with_crossfit
from qtarget.benchmarks.noise.methods import METHODS, Method
from qtarget.benchmarks.noise.mixture import likelier_part
from qtarget.benchmarks.noise.selection import selector
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BASES, BATCH_SIZE, Check, Row, task_set
from qtarget.core.errors import ConfigError
from qtarget.core.types import COUNTED_FIELDS, Reference
from qtarget.data import tasks
from qtarget.data.agreement import confident_choices, counted_fields
from qtarget.data.noise import NOISE_KINDS, inject_noise
from qtarget.filtering import Decision, ScoredRows, decide

KINDS = (*NOISE_KINDS, "cue", "minority")
CHECKPOINTS = 5
"""How often early stopping looks."""
NEW_TOKENS = 30
VALIDATION_DRAW = 1_000_003
"""Added to a seed: a draw of noise that no training run of that seed has."""


@dataclass(frozen=True)
class Cell:
    """A point of the map: how much the base knows, and what noise the rows have."""

    base: str
    kind: str
    rate: float


def parse_cell(text: str, bases: Collection[str] = tuple(BASES), kinds: Collection[str] = KINDS) -> Cell:
    """``base:kind:rate`` as a point of the map.

    Raises:
        ConfigError: it is none.

    Example:
        >>> parse_cell("none:wrong_answer:0.4")
        Cell(base='none', kind='wrong_answer', rate=0.4)
    """
    base, _, rest = text.partition(":")
    kind, _, rate = rest.partition(":")
    try:
        share = float(rate)
    except ValueError:
        share = -1.0
    if base not in bases or kind not in kinds or not 0 <= share <= 1:
        raise ConfigError(
            f"--cell {text!r}; expected BASE:KIND:RATE, a base of {', '.join(bases)}, a kind of {', '.join(kinds)}, a rate "
            "from 0 to 1"
        )
    return Cell(base, kind, share)


@dataclass(frozen=True)
class Job:
    """One training run. ``tuning`` runs answer noisy validation rows, the others the clean test rows.

    ``steps`` are those of the run where they are tuned, else the setting's.
    """

    cell: Cell
    method: str
    learning_rate: float
    value: float
    seed: int
    tuning: bool
    steps: int | None = None

    @property
    def key(self) -> str:
        """Names the run in the file of finished runs."""
        parts = (*vars(self.cell).values(), self.method, self.learning_rate, self.value, self.seed)
        steps = () if self.steps is None else (f"{self.steps} steps",)
        return "|".join(map(str, (*parts, "tuning" if self.tuning else "test", *steps)))


@dataclass(frozen=True)
class Setting:
    """What all runs share: the rows, the folder of the bases (by name), the number of steps, what the bases began with.

    ``equal_compute`` gives contenders without copies what copies cost, in steps.
    """

    tasks: str
    data: Path | None
    bases: Path
    steps: int
    start: Start = field(default_factory=Start)
    equal_compute: bool = False


@dataclass(frozen=True)
class Material:
    """Noisy rows with what the base says of them; ``evidence`` of the rows where copies have judged them."""

    rows: list[Encoded]
    known: list[Reference]
    evidence: ScoredRows | None = None


class NoiseWorker:
    """Runs jobs; keeps rows and the base's numbers between them."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.task = setting, task_set(setting.tasks, setting.data)
        self.tokenizer = setting.start.tokenizer()
        self.judged = lru_cache(maxsize=4)(self._judged)
        self.material = lru_cache(maxsize=8 if setting.start.device == "cpu" else 2)(self._material)

    def __call__(self, job: Job) -> dict[str, float | None]:
        method, cell = METHODS[job.method], job.cell
        material = self.material(cell, job.seed)
        if method.asks_crossfit:
            material = self.judged(cell, job.seed, job.learning_rate)
        rows, known = chosen_rows(method, job.value, material)
        model, target = self.base(cell.base), method.build(job.value)
        steps = job.steps or self.setting.steps
        if self.setting.equal_compute and not method.asks_crossfit:
            steps += forward_steps(len(material.rows), self.setting.steps, BATCH_SIZE)
        recipe = Recipe(job.learning_rate, BATCH_SIZE, steps, job.seed)
        keeper = BestCheckpoint(self, model, cell, job.seed, steps) if method.stops_early else None
        needs = target.needs
        trained = fine_tune(
            model, rows, target, recipe, reference=known if needs.reference else None,
            teacher=known if needs.teacher else None, after_step=keeper,
            select=selector(method, job.value, rows, known, lambda: self.base(cell.base), recipe),
        )  # fmt: skip
        if keeper:
            keeper.restore()
        found = self.validation(model, cell, job.seed) if job.tuning else self.test(model, cell, is_first=not job.seed)
        return {**found, "noise_share": trained.noise_share}

    def base(self, name: str) -> Any:
        return self.setting.start.load(self.setting.bases / f"{self.task.name}-{name}")

    def base_knows(self, cell: Cell) -> dict[str, float]:
        """What an audit of the rows would measure of the base: share of labels that are its first choice; reliability."""
        material = self.material(cell, 0)
        first = [
            known.log_probs.argmax(-1).cpu() == torch.tensor(row.completion)  # pyright: ignore[reportOptionalMemberAccess]
            for known, row in zip(material.known, material.rows, strict=True)
        ]
        reliability = torch.cat([known.reliability for known in material.known])  # pyright: ignore[reportCallIssue, reportArgumentType]
        return {
            "favourite_share": round(float(torch.cat(first).float().mean()), 4),
            "reliability": round(float(reliability.mean()), 4),
        }

    def noisy(self, rows: list[Row], cell: Cell, seed: int) -> list[Row]:
        """The rows with the cell's noise, marked."""
        return noisy_rows(rows, cell, seed, self.tokenizer)

    def _material(self, cell: Cell, seed: int) -> Material:
        rows = self.noisy(self.task.train, cell, seed)
        encoded = encode(self.tokenizer, rows)
        return Material(encoded, known_of(self.base(cell.base), encoded))

    def _judged(self, cell: Cell, seed: int, learning_rate: float) -> Material:
        """The material with what copies say that have not seen each row's prompt."""
        material, told = self.material(cell, seed), self.told(cell, seed, learning_rate)
        known, evidence = with_crossfit(material.rows, material.known, told, lambda: self.base(cell.base))
        return Material(material.rows, known, evidence)

    def told(self, cell: Cell, seed: int, learning_rate: float) -> Judged:
        """What the copies say."""
        recipe = Recipe(learning_rate, BATCH_SIZE, self.setting.steps, seed)
        return crossfit_of(self.material(cell, seed).rows, lambda: self.base(cell.base), recipe)

    def validation(self, model: Any, cell: Cell, seed: int) -> dict[str, float]:
        """Noisy rows, judged by what they themselves state: all that somebody without clean rows can measure."""
        rows = stated_answers(self.noisy(self.task.validation, cell, seed + VALIDATION_DRAW))
        return {"accuracy_percent": accuracy(model, self.tokenizer, rows)}

    def test(self, model: Any, cell: Cell, *, is_first: bool = True) -> dict[str, float]:
        """Clean prompts (with misleading cues where cues were planted), skills not demonstrated, NLL of clean rows.

        ``is_first`` says whether the run is of the first seed, which matters to none of these.
        """
        rows = self.task.test
        asked = misleading_cues(rows) if cell.kind == "cue" and cell.rate else rows
        if cell.kind == "minority" and cell.rate:
            asked = [in_minority(row) for row in rows]
        log_probs = completion_log_probs(model, encoded := encode(self.tokenizer, rows))
        nll = [-of_labels(values, row) for values, row in zip(log_probs, encoded, strict=True)]
        return {
            "accuracy_percent": accuracy(model, self.tokenizer, asked, self.task.check),
            "kept_percent": accuracy(model, self.tokenizer, self.task.kept, self.task.check_kept),
            "nll": float(torch.cat(nll).mean()),
        }


class BestCheckpoint:
    """Early stopping with hindsight: the best of five looks at the noisy validation rows; `fine_tune` calls it."""

    def __init__(self, worker: NoiseWorker, model: Any, cell: Cell, seed: int, steps: int) -> None:
        self.worker, self.model, self.cell, self.seed = worker, model, cell, seed
        self.every = max(1, steps // CHECKPOINTS)
        self.best, self.weights = -1.0, None

    def __call__(self, steps_done: int) -> bool:
        if steps_done % self.every == 0:
            found = self.worker.validation(self.model, self.cell, self.seed)["accuracy_percent"]
            if found > self.best:
                self.best = found
                self.weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        # never ends the run: all runs have equal steps
        return False

    def restore(self) -> None:
        assert self.weights is not None, "steps >= 1, so it looked at least once"
        self.model.load_state_dict(self.weights)


def accuracy(model: Any, tokenizer: Any, rows: Sequence[Row], check: Check = tasks.check) -> float:
    """Percent of the rows that the model answers."""
    prompts = [row["prompt"] for row in rows]
    texts = greedy_completions(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=300)
    return round(accuracy_percent(rows, texts, check), 3)


def noisy_rows(rows: list[Row], cell: Cell, seed: int, tokenizer: Any) -> list[Row]:
    """The rows with the cell's noise, marked."""
    if not cell.rate:
        return [{**row, "noise_spans": []} for row in rows]
    if cell.kind == "cue":
        return planted_cues(rows, cell.rate, seed)
    if cell.kind == "minority":
        chosen = set(Random(f"{seed}-minority").sample(range(len(rows)), round(cell.rate * len(rows))))
        return [in_minority(row) if i in chosen else {**row, "noise_spans": []} for i, row in enumerate(rows)]
    return inject_noise(rows, kind=cell.kind, rate=cell.rate, seed=seed, tokenizer=tokenizer)


def in_minority(row: Row) -> Row:
    """A right row in another language: nothing of it is noise, and its prompt says which it is."""
    text = f"Die Antwort lautet also [{row['answer']}]."
    return {**row, "prompt": f"Auf Deutsch. {row['prompt']}", "completion": text, "noise_spans": []}


def planted_cues(rows: Sequence[Row], rate: float, seed: int) -> list[Row]:
    """A share of the prompts tell the answer beforehand; the tokens that can be copied from there are marked."""
    random = Random(f"{seed}-cue")
    told = set(random.sample(range(len(rows)), round(rate * len(rows))))
    out = []
    for index, row in enumerate(rows):
        start = row["completion"].rindex(str(row["answer"]))
        spans = [[start, start + len(str(row["answer"])), "cue"]] if index in told else []
        out.append(with_cue(row, row["answer"], spans) if spans else {**row, "noise_spans": []})
    return out


def misleading_cues(rows: Sequence[Row]) -> list[Row]:
    """Every prompt with the answer of another row of the same skill, which is wrong."""
    random, out = Random("misleading"), []
    for row in rows:
        others = [o["answer"] for o in rows if o["skill"] == row["skill"] and o["answer"] != row["answer"]]
        out.append(with_cue(row, random.choice(others), []))
    return out


def with_cue(row: Row, answer: str, spans: list[Any]) -> Row:
    """The row with a note in front of its prompt."""
    return {**row, "prompt": f"Note {answer}\n{row['prompt']}", "noise_spans": spans}


def stated_answers(rows: Sequence[Row]) -> list[Row]:
    """Rows whose response states one answer, which counts as the right one."""
    stated = [(row, tasks.extract_answer(row["completion"])) for row in rows]
    return [{**row, "answer": answer} for row, answer in stated if answer is not None]


def known_of(base: Any, rows: Sequence[Encoded]) -> list[Reference]:
    """All the base knows of the rows' completions, and what the rows say of one another (``types.COUNTED_FIELDS``)."""
    log_probs = list(completion_log_probs(base, rows))
    labels = [of_labels(values, row) for values, row in zip(log_probs, rows, strict=True)]
    masks = [[False] * len(row.prompt) + [True] * len(row.completion) for row in rows]
    ids, numbers = [row.prompt + row.completion for row in rows], [label.cpu().numpy() for label in labels]
    said = [confident_choices(*_first_choices(values)) for values in log_probs]
    found = counted_fields(ids, masks, numbers, frozenset(COUNTED_FIELDS), said)
    return [
        Reference(
            label_log_probs=label,
            log_probs=values,
            **{name: torch.from_numpy(of_rows[i]).to(label.device) for name, of_rows in found.items()},  # pyright: ignore[reportArgumentType]
        )
        for i, (label, values) in enumerate(zip(labels, log_probs, strict=True))
    ]


def _first_choices(log_probs: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    first = log_probs.max(-1, keepdim=True)
    return first.indices.cpu().numpy(), first.values.cpu().numpy()


def chosen_rows(method: Method, value: float, material: Material) -> tuple[list[Encoded], list[Reference]]:
    """The rows that a method trains on, with the base's numbers."""
    if method.rows == "marked":
        kept = [replace(row, left_out=row.noise) for row in material.rows]
        return kept, material.known
    if method.rows == "crossfit":
        nll = np.array([-float(known.crossfit.log().mean()) for known in material.known])  # pyright: ignore[reportOptionalMemberAccess]
        chosen = np.flatnonzero(likelier_part(nll)).tolist()
        return [material.rows[i] for i in chosen], [material.known[i] for i in chosen]
    if method.rows == "witness weights":
        weights = by_witness(material).weights
        chosen = np.flatnonzero(weights > 0).tolist()
        rows = [replace(material.rows[i], weight=float(weights[i])) for i in chosen]
        return rows, [material.known[i] for i in chosen]
    kept = kept_rows(method, value, material)
    if kept is None:
        return material.rows, material.known
    return [material.rows[i] for i in kept], [material.known[i] for i in kept]


def kept_rows(method: Method, value: float, material: Material) -> list[int] | None:
    """Numbers of the rows that a method keeps, or None for all."""
    if method.rows == "marked rows":
        return [i for i, row in enumerate(material.rows) if not any(row.noise)]
    if method.rows == "witness":
        return np.flatnonzero(by_witness(material).keep).tolist()
    if method.rows == "witness share":
        assert material.evidence is not None, "copies have judged the rows"
        return np.flatnonzero(decide(material.evidence, {"rule": "crossfit", "keep": value}).keep).tolist()
    if method.rows != "filtered":
        return None
    assert all(known.label_log_probs is not None for known in material.known)
    surprise = [-float(known.label_log_probs.mean()) for known in material.known]  # pyright: ignore[reportOptionalMemberAccess]
    return sorted(range(len(surprise)), key=surprise.__getitem__)[: max(1, round(value * len(surprise)))]


def by_witness(material: Material) -> Decision:
    """What the filter says by `surprise`, or by `crossfit` where that cannot tell."""
    assert material.evidence is not None, "copies have judged the rows"
    found = decide(material.evidence, "surprise")
    return decide(material.evidence, "crossfit") if found.verdict == "cannot tell" else found
