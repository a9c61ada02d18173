"""One run of `bench distill`: a method, a share of the rows, a seed; what the student answers afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from qtarget.benchmarks.distill.data import WHOLE, CacheKind, Sizes, answered, read_rows, read_teacher, split_rows
from qtarget.benchmarks.finetune import Encoded, Recipe, Trained, completion_log_probs, fine_tune
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import Row
from qtarget.core.errors import ConfigError
from qtarget.core.types import Reference, TailPolicy, Target
from qtarget.data import tasks
from qtarget.registry import get_target
from qtarget.targets.taid import next_interpolation

FULL = CacheKind(top_k=WHOLE, log_probs_dtype="float32")
ETAS = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
TOP_KS = (2, 8, 32)
DRAWS = 50
POLICIES: tuple[TailPolicy, ...] = ("bucket", "spread", "renormalize")
BASELINE, FULL_LOGITS = "sft", "distillation"


@dataclass(frozen=True)
class Method:
    """A target, its hyper-parameters, and the cache that it reads.

    Attributes:
        cache: absent where the teacher's text is all that is used.
        scheduled: taid's interpolation moves as its paper says.
        right_rows: an oracle: rows whose answer is wrong, which nobody is told of, are left out. No weight of rows can know more.
    """

    name: str
    target: str
    hyperparameters: dict[str, float] = field(default_factory=dict)
    cache: CacheKind | None = FULL
    policy: TailPolicy = "bucket"
    scheduled: bool = False
    right_rows: bool = False

    def build(self, steps: int) -> Target | TaidSchedule:
        return TaidSchedule(steps) if self.scheduled else get_target(self.target, **self.hyperparameters)


class TaidSchedule:
    """The target of each step; ``fine_tune`` calls it."""

    def __init__(self, steps: int) -> None:
        self.steps, self.momentum, self.interpolation = steps, 0.0, 0.4

    def __call__(self, trained: Trained) -> Target:
        if len(losses := trained.losses) > 1:
            self.interpolation, self.momentum = next_interpolation(
                self.interpolation, self.momentum, losses[-1], losses[-2], len(losses) / self.steps
            )
        return get_target("taid", interpolation=self.interpolation)


def _methods() -> dict[str, Method]:
    listed = [
        Method(f"top{k}_{policy}", FULL_LOGITS, cache=CacheKind(top_k=k), policy=policy)
        for k in TOP_KS
        for policy in POLICIES
    ]
    found = [
        Method(BASELINE, "sft", cache=None),
        Method(FULL_LOGITS, "distillation"),
        *listed,
        Method(f"draws{DRAWS}", FULL_LOGITS, cache=CacheKind(sampled=DRAWS), policy="sampled"),
        *(Method(f"target_sft_{eta:g}", "target_sft", {"eta": eta}) for eta in ETAS),
        *(Method(name, name) for name in ("reverse_kl", "generalized_jsd", "skew_kl")),
        Method("taid", "taid", scheduled=True),
        Method(f"{BASELINE}, right rows", "sft", cache=None, right_rows=True),
        Method(f"{FULL_LOGITS}, right rows", "distillation", right_rows=True),
    ]
    return {method.name: method for method in found}


METHODS = _methods()
WITHOUT_ORACLES = tuple(name for name, method in METHODS.items() if not method.right_rows)


def method(name: str) -> Method:
    """By name.

    Raises:
        ConfigError: no such name.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]


@dataclass(frozen=True)
class Job:
    """One training run; ``tuning`` runs answer validation prompts, the others the test prompts."""

    method: str
    fraction: float
    learning_rate: float
    seed: int
    tuning: bool

    @property
    def key(self) -> str:
        """Names the run in the file of finished runs."""
        parts = self.method, self.fraction, self.learning_rate, self.seed, "tuning" if self.tuning else "test"
        return "|".join(map(str, parts))


class DistillWorker:
    """Runs jobs; keeps rows and the teacher's numbers between them."""

    def __init__(self, sizes: Sizes, folder: Path, steps: int, batch_size: int, start: Start) -> None:
        self.folder, self.steps, self.batch_size, self.start = folder, steps, batch_size, start
        self.tokenizer = start.tokenizer()
        self.rows, self.held_out, self.asked = read_rows(folder, "train"), read_rows(folder, "test"), split_rows(sizes)
        # once: every run is compared with the same teacher on the same text
        self.frozen = list(completion_log_probs(start.load(folder / "teacher"), self.held_out))
        self.right = right_answers(self.rows, self.asked["train"], self.tokenizer)
        self.teacher = lru_cache(maxsize=4)(self._teacher)

    def __call__(self, job: Job) -> dict[str, Any]:
        chosen = chosen_rows(len(self.rows), job.fraction, job.seed)
        plan, model = method(job.method), self.start.load()
        if plan.right_rows:
            chosen = [i for i in chosen if self.right[i]]
        teacher = self.teacher(plan.cache, plan.policy) if plan.cache else None
        recipe = Recipe(job.learning_rate, self.batch_size, self.steps, job.seed)
        fine_tune(
            model,
            [self.rows[i] for i in chosen],
            plan.build(self.steps),
            recipe,
            teacher=[teacher[i] for i in chosen] if teacher else None,
        )
        right = answered(model, self.tokenizer, self.asked["validation" if job.tuning else "test"])
        found: dict[str, Any] = {"answered": "".join("01"[ok] for ok in right)}
        return found if job.tuning else found | {"kl_to_teacher": self.kl_to_teacher(model)}

    def kl_to_teacher(self, model: Any) -> float:
        """Mean ``KL(teacher || student)`` in nats at the tokens of what the teacher wrote to the test prompts."""
        teacher, student = torch.cat(self.frozen), torch.cat(list(completion_log_probs(model, self.held_out)))
        return round(float((teacher.exp() * (teacher - student)).sum(-1).mean()), 6)

    def _teacher(self, kind: CacheKind, policy: TailPolicy) -> list[Reference]:
        rows = read_teacher(self.folder / "caches", kind, policy, self.frozen[0].shape[-1])
        return [row.map_tensors(lambda _, tensor: tensor.to(self.start.device)) for row in rows]


def right_answers(rows: Sequence[Encoded], asked: Sequence[Row], tokenizer: Any) -> list[bool]:
    """Which rows of the teacher's text answer their prompt rightly."""
    of_prompt = {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in asked}
    texts = tokenizer.batch_decode([row.completion for row in rows], skip_special_tokens=True)
    return [tasks.check(of_prompt[tuple(row.prompt)], text) for row, text in zip(rows, texts, strict=True)]


def chosen_rows(count: int, fraction: float, seed: int) -> list[int]:
    """The rows of a run: a smaller fraction is part of a larger one of the same seed, and the same for all methods."""
    return Random(f"rows {seed}").sample(range(count), count)[: max(1, round(fraction * count))]
