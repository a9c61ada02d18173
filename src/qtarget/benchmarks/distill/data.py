"""What `bench distill` trains on: a teacher made on the spot, the text that it writes, and real caches of its distribution."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from qtarget.benchmarks.finetune import Encoded, Recipe, encode, fine_tune
from qtarget.benchmarks.generation import accuracy_percent, greedy_completions
from qtarget.benchmarks.scoring.cache import read_references
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import Row, generated_demonstrations
from qtarget.core.errors import ConfigError
from qtarget.core.types import Reference, TailPolicy
from qtarget.data import tasks
from qtarget.data.embedded import load_demonstrations
from qtarget.evaluation.generation import rows_at_once
from qtarget.registry import get_target
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_tokenizer, size_on_disk
from qtarget.scoring.sources.local import score_rows
from qtarget.storage.files import write_json
from qtarget.storage.models import save_whole

LONGEST = 40
"""Tokens that teacher and student may write; a demonstration has 12 on average."""
AT_ONCE = 300
TEACHER_BATCH = 16
WHOLE = -1
"""The top k that is the whole vocabulary."""


@dataclass(frozen=True)
class CacheKind:
    """How a cache is written: the top k (``WHOLE``: all), or draws."""

    top_k: int = 0
    sampled: int = 0
    log_probs_dtype: str = "float16"

    @property
    def name(self) -> str:
        return f"draws{self.sampled}" if self.sampled else "whole" if self.top_k == WHOLE else f"top{self.top_k}"


@dataclass(frozen=True)
class Sizes:
    """Rows of each part and steps of the teacher."""

    train_rows: int
    validation_rows: int
    test_rows: int
    teacher_steps: int


def split_rows(sizes: Sizes) -> dict[str, list[Row]]:
    """Embedded rows: ``train`` (prompts only are used; more than needed), ``validation`` and ``test``.

    Raises:
        ConfigError: more rows are asked for than are embedded.
    """
    rows, test = Random(0).sample(whole := load_demonstrations("train"), len(whole)), load_demonstrations("test")
    if sizes.train_rows + sizes.validation_rows > len(rows) or sizes.test_rows > len(test):
        raise ConfigError(
            f"{sizes.train_rows} training, {sizes.validation_rows} validation and {sizes.test_rows} test rows asked for; "
            f"{len(rows)} are embedded for the first two, {len(test)} for the last"
        )
    train = rows[sizes.validation_rows :]
    asked = {row["prompt"] for row in train}
    validation = [row for row in rows[: sizes.validation_rows] if row["prompt"] not in asked]
    return {"train": train, "validation": validation, "test": Random(0).sample(test, sizes.test_rows)}


def make_teacher(start: Start, folder: Path, steps: int) -> None:
    """The start after ``steps`` of SFT on generated demonstrations, each seen once, all of other questions."""
    taken = {row["prompt"] for split in ("train", "test") for row in load_demonstrations(split)}
    rows = generated_demonstrations(steps * TEACHER_BATCH, "teacher", taken)
    model = start.load()
    recipe = Recipe(start.learning_rate, TEACHER_BATCH, steps)
    fine_tune(model, encode(start.tokenizer(), rows), get_target("sft"), recipe)
    save_whole(model, folder)


@torch.no_grad()
def write_text(teacher: Any, tokenizer: Any, prompts: Sequence[str]) -> list[Encoded | None]:
    """One answer a prompt, drawn from the teacher at temperature 1; None where it did not end."""
    torch.manual_seed(0)
    out: list[Encoded | None] = []
    at_once = rows_at_once(teacher, tokenizer, AT_ONCE)
    for start in range(0, len(prompts), at_once):
        part = list(prompts[start : start + at_once])
        batch = tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
        written = teacher.generate(
            input_ids=batch["input_ids"].to(teacher.device),
            attention_mask=batch["attention_mask"].to(teacher.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=LONGEST,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :].tolist()
        for prompt, ids in zip(part, written, strict=True):
            if tokenizer.eos_token_id not in ids:
                out.append(None)
                continue
            ids = ids[: ids.index(tokenizer.eos_token_id) + 1]
            out.append(Encoded(tokenizer(prompt)["input_ids"], ids, [False] * len(ids)))
    return out


def write_caches(
    teacher: Any, tokenizer: Any, rows: Sequence[Encoded], kinds: Sequence[CacheKind], folder: Path
) -> dict[str, dict[str, float]]:
    """One cache of each kind over the same rows; bytes a token of all its files."""
    tokenised = [
        {"input_ids": row.prompt + row.completion, "labels": [-100] * len(row.prompt) + row.completion} for row in rows
    ]
    found = {}
    for kind in kinds:
        path = folder / kind.name
        manifest = score_rows(
            teacher,
            tokenised,
            path,
            model_id="teacher of bench distill",
            tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
            chat_template_fingerprint=fingerprint_chat_template(tokenizer),
            top_k=teacher.config.vocab_size if kind.top_k == WHOLE else kind.top_k,
            sampled=kind.sampled,
            log_probs_dtype=kind.log_probs_dtype,
            progress=False,
        )
        size = size_on_disk(path)
        found[kind.name] = {"bytes_per_token": round(size / manifest.tokens, 2), "tokens": manifest.tokens}
    return found


def dense(reference: Reference, vocab_size: int) -> Reference:
    """The whole distribution of rows whose every id is listed."""
    assert reference.topk_ids is not None and reference.topk_log_probs is not None
    values = torch.full((len(reference.topk_ids), vocab_size), -torch.inf)
    return Reference(log_probs=values.scatter(-1, reference.topk_ids, reference.topk_log_probs))


def read_teacher(folder: Path, kind: CacheKind, policy: TailPolicy, vocab_size: int) -> list[Reference]:
    """What a cache knows of the teacher, row by row; the whole distribution if every id is listed."""
    rows = read_references(folder / kind.name, policy)
    return [dense(row, vocab_size) for row in rows] if kind.top_k == WHOLE else rows


def answered(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[bool]:
    """Which prompts the model answers exactly, greedily."""
    prompts = [row["prompt"] for row in rows]
    texts = greedy_completions(model, tokenizer, prompts, max_new_tokens=LONGEST, batch_size=AT_ONCE)
    return [tasks.check(row, text) for row, text in zip(rows, texts, strict=True)]


def prepare(
    sizes: Sizes, kinds: Sequence[CacheKind], folder: Path, start: Start, say: Callable[[str], None]
) -> dict[str, Any]:
    """Teacher, text and caches in ``folder``; what is finished there is kept (the caller says when it may be).

    Returns:
        Facts about them, as in the results.
    """
    ready = folder / "ready.json"
    if ready.exists():
        return json.loads(ready.read_text())
    tokenizer, rows = start.tokenizer(), split_rows(sizes)
    if not (folder / "teacher" / "config.json").is_file():
        say("training the teacher")
        make_teacher(start, folder / "teacher", sizes.teacher_steps)
    teacher = start.load(folder / "teacher").eval()
    say("the teacher writes")
    asked = rows["train"][: sizes.train_rows + sizes.train_rows // 8 + 8]  # a few answers do not end
    kept = finished(teacher, tokenizer, asked)
    if len(kept) < sizes.train_rows:
        raise ConfigError(
            f"the teacher ended {len(kept)} of {len(asked)} answers, {sizes.train_rows} are needed; train it longer"
        )
    kept = kept[: sizes.train_rows]
    text = [encoded for _, encoded in kept]
    held_out = [encoded for _, encoded in finished(teacher, tokenizer, rows["test"])]
    parts = {"train": text, "test": held_out}
    write_json(folder / "rows.json", {n: [[row.prompt, row.completion] for row in part] for n, part in parts.items()})
    say("writing caches")
    words = tokenizer.batch_decode([row.completion for row in text], skip_special_tokens=True)
    facts = {
        "teacher_percent": percent(answered(teacher, tokenizer, rows["test"])),
        "text_percent": accuracy_percent([row for row, _ in kept], words, tasks.check),
        "caches": write_caches(teacher, tokenizer, text, kinds, folder / "caches"),
    }
    write_json(ready, facts)
    return facts


def finished(teacher: Any, tokenizer: Any, rows: Sequence[Row]) -> list[tuple[Row, Encoded]]:
    """Rows whose answer the teacher ended, with what it wrote."""
    written = write_text(teacher, tokenizer, [row["prompt"] for row in rows])
    return [(row, text) for row, text in zip(rows, written, strict=True) if text is not None]


def percent(answers: Sequence[bool]) -> float:
    """Share that is true.

    Example:
        >>> percent([False, True, True, True])
        75.0
    """
    return round(100 * sum(answers) / len(answers), 3)


def read_rows(folder: Path, split: str) -> list[Encoded]:
    """The teacher's text on the prompts of ``train`` or ``test``, as ``prepare`` left it."""
    rows = json.loads((folder / "rows.json").read_text())[split]
    return [Encoded(prompt, completion, [False] * len(completion)) for prompt, completion in rows]
