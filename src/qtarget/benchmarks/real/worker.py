"""One run of `bench noise --base smollm2`: adapters on a real model, what it can do afterwards and what it forgot."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch

from qtarget.benchmarks.finetune import Encoded, Recipe, completion_log_probs, encode, of_labels
from qtarget.benchmarks.noise.crossfitting import Judged, crossfit_of
from qtarget.benchmarks.noise.runs import VALIDATION_DRAW, Cell, Job, NoiseWorker, Setting, accuracy
from qtarget.benchmarks.real.demonstrations import (
    ELSEWHERE,
    LONGEST_ANSWER,
    MARKED,
    WRITTEN,
    as_turn,
    shown_tasks,
    unpacked,
    with_wrong_solutions,
)
from qtarget.benchmarks.real.instructions import PROMPTS, instruction_following, instruction_rows, official_checks
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, Row, teach
from qtarget.core.errors import ConfigError
from qtarget.storage.models import save_whole

Form = Literal["chat", "instruction"]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("float32", "bfloat16")
TEXT_TOKENS, SEEN_TOKENS = 64, 8
"""Of a piece of running text, and how many of them are given and not asked."""


@dataclass(frozen=True)
class Scope:
    """How much of everything.

    Attributes:
        form: ``chat`` puts questions into the model's own chat template, ``instruction`` into the embedded tasks' words.
        tasks: what demonstrations are of, a name that ``check_tasks`` knows.
        train_rows: demonstrations.
        test_rows: clean prompts that a run answers where a program can check it, and rows whose NLL it is asked.
        texts: pieces of running text, and human answers, by which forgetting is measured.
        prompts: with instructions that a program can check (IFEval), asked after the runs of the first seed.
        answer_tokens: where an answer to one of them is cut, if it has not ended.
        rank: of the LoRA adapters on all linear layers; 0 trains all weights.
        dtype: of the model; adapters, and losses from the logits on, are float32.
    """

    form: Form = "chat"
    tasks: str = "embedded"
    train_rows: int = 640
    test_rows: int = 120
    texts: int = 60
    prompts: int = PROMPTS
    answer_tokens: int = 128
    rank: int = 16
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; expected {' or '.join(DTYPES)}")
        if self.dtype != "float32" and not self.rank:
            raise ConfigError(f"rank 0 trains all weights, which {self.dtype} is too coarse for; say dtype float32")


class RealWorker(NoiseWorker):
    """Runs jobs on the start itself: a real model is its own base.

    Args:
        setting: with the start; its ``data`` is the folder of real texts, or None: then neither forgetting nor instruction
            following is measured.
        scope: of rows and adapters.
    """

    def __init__(self, setting: Setting, scope: Scope) -> None:
        super().__init__(replace(setting, tasks="embedded"))
        # a row's log-probs are 200 kB a token with this vocabulary: one point and seed are kept, not eight
        self.material = lru_cache(maxsize=1)(self._material)
        self.judged = lru_cache(maxsize=1)(self._judged)
        self.told = lru_cache(maxsize=None)(self._told)  # of the labels alone, and two trainings each
        self.scope = scope
        self.task = shown_tasks(
            scope.tasks, setting.data, scope.train_rows, scope.test_rows,
            in_chat_form=scope.form == "chat", tokenizer=self.tokenizer,
        )  # fmt: skip
        self.elsewhere = elsewhere(setting.data, scope.texts, self.tokenizer)
        self.elsewhere.pop(f"{scope.tasks}_nll", None)  # it was taught, so it is not elsewhere
        self.instructions = instruction_rows(setting.data, scope.prompts)
        if self.instructions:
            official_checks()  # what is missing is said before anything is trained

    def __call__(self, job: Job) -> dict[str, Any]:
        torch.manual_seed(job.seed)  # adapters begin at random
        wall, cpu = time.perf_counter(), time.process_time()
        found = super().__call__(job)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**found, **{name: round(value, 1) for name, value in spent.items()}}

    def base(self, name: str) -> Any:
        """A new copy, with adapters that change nothing yet."""
        return with_adapters(self.setting.start.load(dtype=self.scope.dtype), self.scope.rank)

    def noisy(self, rows: list[Row], cell: Cell, seed: int) -> list[Row]:
        """The rows with the cell's noise, marked; the data's own wrong solutions where it has them."""
        return with_wrong_solutions(rows, cell.rate, seed) if cell.kind == MARKED else super().noisy(rows, cell, seed)

    def _told(self, cell: Cell, seed: int, learning_rate: float) -> Judged:
        """What copies say that have not seen each row's prompt; other prompts would take six passes more."""
        recipe = Recipe(learning_rate, BATCH_SIZE, self.setting.steps, seed)
        rows = self.material(cell, seed).rows
        return crossfit_of(rows, lambda: self.base(cell.base), recipe, other_prompts=False)

    def validation(self, model: Any, cell: Cell, seed: int) -> dict[str, float]:
        """Noisy rows, by what they themselves state; of written answers, which state nothing to check, token by token."""
        if self.scope.tasks not in WRITTEN:
            return super().validation(model, cell, seed)
        rows = self.noisy(self.task.validation, cell, seed + VALIDATION_DRAW)
        return {"accuracy_percent": first_choice_percent(model, encode(self.tokenizer, rows))}

    def test(self, model: Any, cell: Cell, *, is_first: bool = True) -> dict[str, Any]:
        """Clean prompts, NLL of clean rows, and NLL of what was not trained (nats a token); of the first seed what it follows.

        Of written answers ``accuracy_percent`` is the share of their tokens that are the model's first choice.
        """
        rows = self.task.test
        encoded = encode(self.tokenizer, rows)
        found: dict[str, Any] = {
            "accuracy_percent": first_choice_percent(model, encoded)
            if self.scope.tasks in WRITTEN
            else accuracy(model, self.tokenizer, rows, self.task.check),
            "nll": mean_nll(model, encoded),
            **{name: mean_nll(model, texts) for name, texts in self.elsewhere.items()},
        }
        if self.instructions and is_first:
            asked, longest = self.instructions, self.scope.answer_tokens
            found["instructions"] = instruction_following(model, self.tokenizer, asked, longest)
        return found


def with_adapters(model: Any, rank: int) -> Any:
    """The model with new adapters of this rank on all linear layers, float32, which alone are trained; itself at rank 0."""
    if not rank:
        return model
    from peft import cast_mixed_precision_params, inject_adapter_in_model

    adapted = inject_adapter_in_model(adapters(rank), model)
    cast_mixed_precision_params(adapted, model.dtype)  # what is trained to float32, as peft does for a whole PeftModel
    return adapted


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


def elsewhere(data: Path | None, count: int, tokenizer: Any) -> dict[str, list[Encoded]]:
    """What a model should not forget: running text (WikiText-2), and human answers in chat form (dolly).

    Raises:
        DataError: a file is missing.
    """
    if data is None:
        return {}
    lines = unpacked(data / ELSEWHERE[0]).splitlines()
    texts = [tokenizer(line.strip())["input_ids"][:TEXT_TOKENS] for line in _drawn(lines, count, len)]
    rows = json.loads(unpacked(data / ELSEWHERE[1]))
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


def mean_nll(model: Any, rows: Sequence[Encoded], batch_size: int = 16) -> float:
    """Nats a token over all completions."""
    total, count = 0.0, 0
    for values, row in _in_turn(model, rows, batch_size):
        total -= float(of_labels(values, row).sum())
        count += len(row.completion)
    return round(total / count, 4)


def first_choice_percent(model: Any, rows: Sequence[Encoded]) -> float:
    """Share of the tokens of all completions that are the model's first choice."""
    right, count = 0, 0
    for values, row in _in_turn(model, rows):
        right += int((values.argmax(-1).cpu() == torch.tensor(row.completion)).sum())
        count += len(row.completion)
    return round(100 * right / count, 3)


def _in_turn(model: Any, rows: Sequence[Encoded], batch_size: int = 16) -> Iterator[tuple[torch.Tensor, Encoded]]:
    """Log-probs of each row, a few rows at once: those of one are as wide as the vocabulary."""
    return zip(completion_log_probs(model, rows, batch_size), rows, strict=True)
