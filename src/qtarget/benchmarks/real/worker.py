"""One run of `bench noise --base smollm2`: adapters on a real model, what it can do afterwards and what it forgot."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

from qtarget.benchmarks.finetune import Encoded, Recipe, completion_log_probs, encode, of_labels
from qtarget.benchmarks.noise.crossfitting import Judged, crossfit_of
from qtarget.benchmarks.noise.runs import Cell, Job, NoiseWorker, Setting, accuracy
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, Row, TaskSet, embedded_tasks, teach
from qtarget.core.errors import DataError
from qtarget.data import tasks
from qtarget.storage.models import save_whole

Form = Literal["chat", "instruction"]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXT_TOKENS, SEEN_TOKENS = 64, 8
"""Of a piece of running text, and how many of them are given and not asked."""
LONGEST_ANSWER = 160
"""Characters of a human answer, for memory's sake."""


@dataclass(frozen=True)
class Scope:
    """How much of everything.

    Attributes:
        form: ``chat`` puts questions into the model's own chat template, ``instruction`` into the embedded tasks' words.
        train_rows: demonstrations of the nine embedded skills.
        test_rows: clean prompts that a run answers, and rows whose NLL it is asked.
        texts: pieces of running text, and human answers, by which forgetting is measured.
        rank: of the LoRA adapters on all linear layers; 0 trains all weights.
    """

    form: Form = "chat"
    train_rows: int = 640
    test_rows: int = 120
    texts: int = 60
    rank: int = 16


class RealWorker(NoiseWorker):
    """Runs jobs on the start itself: a real model is its own base.

    Args:
        setting: with the start; its ``data`` is the folder of real texts, or None, and then forgetting is not measured.
        scope: of rows and adapters.
    """

    def __init__(self, setting: Setting, scope: Scope) -> None:
        super().__init__(replace(setting, tasks="embedded"))
        # a row's log-probs are 200 kB a token with this vocabulary: one point and seed are kept, not eight
        self.material = lru_cache(maxsize=1)(self._material)
        self.judged = lru_cache(maxsize=1)(self._judged)
        self.told = lru_cache(maxsize=None)(self._told)  # of the labels alone, and two trainings each
        self.scope = scope
        self.task = real_tasks(scope, self.tokenizer)
        self.elsewhere = elsewhere(setting.data, scope.texts, self.tokenizer)

    def __call__(self, job: Job) -> dict[str, float | None]:
        torch.manual_seed(job.seed)  # adapters begin at random
        wall, cpu = time.perf_counter(), time.process_time()
        found = super().__call__(job)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**found, **{name: round(value, 1) for name, value in spent.items()}}

    def base(self, name: str) -> Any:
        """A new copy, with adapters that change nothing yet."""
        return with_adapters(self.setting.start.load(), self.scope.rank)

    def _told(self, cell: Cell, seed: int, learning_rate: float) -> Judged:
        """What copies say that have not seen each row's prompt; other prompts would take six passes more."""
        recipe = Recipe(learning_rate, BATCH_SIZE, self.setting.steps, seed)
        rows = self.material(cell, seed).rows
        return crossfit_of(rows, lambda: self.base(cell.base), recipe, other_prompts=False)

    def test(self, model: Any, cell: Cell) -> dict[str, float]:
        """Clean prompts, NLL of clean rows, and NLL of what was not trained; nats a token."""
        rows = self.task.test
        return {
            "accuracy_percent": accuracy(model, self.tokenizer, rows, self.task.check),
            "nll": mean_nll(model, encode(self.tokenizer, rows)),
            **{name: mean_nll(model, found) for name, found in self.elsewhere.items()},
        }


def with_adapters(model: Any, rank: int) -> Any:
    """The model with new adapters of this rank on all linear layers, which alone are trained; itself at rank 0."""
    if not rank:
        return model
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(adapters(rank), model)


def adapters(rank: int, task_type: str | None = None) -> Any:
    """The ``LoraConfig`` of all runs; a trainer asks for the type of task, too."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(MODULES), task_type=task_type)


def teach_by_adapters(start: Start, rows: list[Row], steps: int, rank: int, path: Path) -> None:
    """Plain SFT of the start on these rows, by adapters that are merged, into ``path``, float32; all weights at rank 0."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = start.load()
    adapted: Any = get_peft_model(model, adapters(rank)) if rank else None
    # the adapters stand in the model itself, which the loop trains
    teach(model, start, rows, steps, seed=1)
    save_whole(adapted.merge_and_unload() if adapted else model, path)


def real_tasks(scope: Scope, tokenizer: Any) -> TaskSet:
    """The nine embedded skills in the form of the scope; there is no format that the base alone knows."""
    task = embedded_tasks(scope.train_rows)

    def formed(rows: Sequence[Row]) -> list[Row]:
        return [in_chat(row, tokenizer) if scope.form == "chat" else row for row in rows]

    return replace(
        task,
        train=formed(task.train),
        validation=formed(task.validation),
        test=formed(task.test[: scope.test_rows]),
        kept=[],
    )


def in_chat(row: Row, tokenizer: Any) -> Row:
    """A demonstration whose question is a user's turn.

    Raises:
        DataError: see ``question_of``.
    """
    return {**row, "prompt": as_turn(question_of(row), tokenizer)}


def question_of(row: Row) -> str:
    """What a demonstration asks, without the words around it.

    Raises:
        DataError: the prompt is not in the words of the embedded tasks.

    Example:
        >>> question_of({"prompt": "Instruction: Add 1 1.\\nResponse:\\n"})
        'Add 1 1.'
    """
    before, after = tasks.INSTRUCTION_TEMPLATE.split("{instruction}")
    prompt = row["prompt"]
    if not (prompt.startswith(before) and prompt.endswith(after)):
        raise DataError(f"{prompt!r} is no instruction; expected {tasks.INSTRUCTION_TEMPLATE!r}")
    return prompt[len(before) : -len(after)]


def as_turn(question: str, tokenizer: Any) -> str:
    """A question up to where the assistant begins."""
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def elsewhere(data: Path | None, count: int, tokenizer: Any) -> dict[str, list[Encoded]]:
    """What a model should not forget: running text (WikiText-2), and human answers in chat form (dolly).

    Raises:
        DataError: a file is missing.
    """
    if data is None:
        return {}
    lines = unpacked(data / "text_corpora" / "wikitext2_valid.txt.gz").splitlines()
    texts = [tokenizer(line.strip())["input_ids"][:TEXT_TOKENS] for line in _drawn(lines, count, len)]
    rows = json.loads(unpacked(data / "dolly_3k" / "dolly_3k.json.gz"))
    short = [row for row in rows if not row["input"] and len(row["output"]) <= LONGEST_ANSWER]
    answered = [
        {"prompt": as_turn(row["instruction"], tokenizer), "completion": row["output"]}
        for row in Random(0).sample(short, min(count, len(short)))
    ]
    return {
        "wikitext_nll": [_asked(ids) for ids in texts],
        "dolly_nll": encode(tokenizer, answered),
    }


def _drawn(lines: list[str], count: int, size: Any) -> list[str]:
    """Lines that are long enough to be cut to one length."""
    return Random(0).sample([line for line in lines if size(line) > 8 * TEXT_TOKENS], count)


def _asked(ids: list[int]) -> Encoded:
    return Encoded(ids[:SEEN_TOKENS], ids[SEEN_TOKENS:], [False] * (len(ids) - SEEN_TOKENS))


def unpacked(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path} is missing; name the folder of the real data with --data, or leave it out")
    return gzip.decompress(path.read_bytes()).decode("utf-8")


def mean_nll(model: Any, rows: Sequence[Encoded], batch_size: int = 16) -> float:
    """Nats a token over all completions, a few rows at once: a row's log-probs are as wide as the vocabulary."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        for values, row in zip(completion_log_probs(model, chosen, batch_size), chosen, strict=True):
            total -= float(of_labels(values, row).sum())
            count += len(row.completion)
    return round(total / count, 4)
