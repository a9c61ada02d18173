"""The runs of ``qtarget demo --rl``: a bare loop of sampling and updates on the embedded model, seconds a run."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from qtarget.benchmarks.finetune import Recipe, encode, fine_tune
from qtarget.benchmarks.sampling import GROUP, PROMPTS, right_answers, sample_round, update
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, TaskSet, generated_demonstrations, task_set, teach
from qtarget.evaluation.generation import GREEDY, Decoding
from qtarget.registry import get_target
from qtarget.storage.models import save_whole

START, TEACHER = "start", "teacher"
STEPS = {START: 100, TEACHER: 200}
"""Supervised steps of 16 rows behind both models."""


@dataclass(frozen=True)
class Way:
    """How one run goes on from the start.

    Attributes:
        target: name of the objective; ``sft`` reads demonstrations, all others samples.
        learning_rate: of Adam; constant, but for sft.
        age: weights of so many rounds ago sample.
        updates: optimizer steps on the samples of a round.
    """

    target: str
    learning_rate: float
    age: int = 0
    updates: int = 1


WAYS = {
    "sft": Way("sft", 1e-3),
    "distillation on samples": Way("reverse_kl", 5e-4),
    "dppo_tv": Way("dppo_tv", 2e-4),
    "stale policy_gradient": Way("policy_gradient", 2e-4, age=4, updates=4),
    "stale ppo_clip": Way("ppo_clip", 2e-4, age=4, updates=4),
    "stale dppo_tv": Way("dppo_tv", 2e-4, age=4, updates=4),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    way: str
    seed: int


def make_models(folder: Path, steps: Mapping[str, int]) -> None:
    """Teach start and teacher on the same clean demonstrations, into ``folder``."""
    task, start = task_set("embedded", None), Start()
    for name, count in steps.items():
        model = start.load()
        teach(model, start, task.warmup, count)
        save_whole(model, folder / name)


class RLWorker:
    """Runs jobs, from models that ``make_models`` left in a folder.

    Args:
        folder: of start and teacher.
        rounds: of sampling; sft reads as many rows as the others sample.
        test_rows: held-out prompts.
        draws: samples of each, at temperature 1.
    """

    def __init__(self, folder: Path, rounds: int, test_rows: int, draws: int) -> None:
        self.folder, self.rounds, self.draws = folder, rounds, draws
        self.task: TaskSet = task_set("embedded", None)
        self.test = self.task.test[:test_rows]
        self.tokenizer = Start().tokenizer()
        self.teacher = self.load(TEACHER).eval()

    def load(self, name: str) -> Any:
        """Start or teacher, as it was made."""
        return Start().load(self.folder / name)

    def __call__(self, job: Job) -> dict[str, Any]:
        """Sampled and greedy accuracy after the run, what it saw on the way, and its CPU seconds."""
        begin = time.process_time()
        found = self.run(WAYS[job.way], job.seed)
        return found | {"cpu_seconds": round(time.process_time() - begin, 1)}

    def run(self, way: Way, seed: int) -> dict[str, Any]:
        """Go on from the start in one way."""
        model = self.load(START)
        taken = {row["prompt"] for row in self.task.test}
        if way.target == "sft":
            rows = generated_demonstrations(self.rounds * PROMPTS * GROUP, f"demo {seed}", taken)
            recipe = Recipe(way.learning_rate, BATCH_SIZE, len(rows) // BATCH_SIZE, seed)
            fine_tune(model, encode(self.tokenizer, rows), get_target("sft"), recipe)
            return self.score(model)
        asked = generated_demonstrations(self.rounds * PROMPTS, f"demo {seed}", taken)
        seen = self.improve(model, way, asked, seed)
        return self.score(model) | seen

    def improve(self, model: Any, way: Way, asked: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
        """Sample and update, round by round; returns rewards by round, KL to the sampler, share blocked."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=way.learning_rate, weight_decay=0.0)
        old: deque[Any] = deque(maxlen=way.age + 1)
        target, rewards, moved, blocked = get_target(way.target), [], [], []
        shuffle = torch.Generator().manual_seed(seed)
        for number in range(self.rounds):
            old.append(copy.deepcopy(model).eval() if way.age else model)
            prompts = asked[number * PROMPTS : (number + 1) * PROMPTS]
            drawn = sample_round(old[0], self.tokenizer, prompts, seed * 10_000 + number)
            rewards.append(float(drawn.rewards.mean()))
            for part in torch.randperm(len(drawn.rows), generator=shuffle).chunk(way.updates):
                kl, share = update(
                    model, optimizer, target, drawn, part.tolist(), is_live=not way.age, teacher=self.teacher
                )
                moved.append(kl)
                blocked.append(share)
        return {"reward": rewards, "kl_k3": fmean(moved), "blocked": fmean(blocked)}

    def score(self, model: Any) -> dict[str, float]:
        """Percent of held-out prompts answered exactly: by samples at temperature 1, and by the likeliest tokens."""
        sampled = Decoding(temperature=1.0, samples=self.draws)
        return {"sampled_percent": self.accuracy(model, sampled), "greedy_percent": self.accuracy(model, GREEDY)}

    def accuracy(self, model: Any, decoding: Decoding) -> float:
        """In percent, over prompts and draws."""
        right = right_answers(model, self.tokenizer, self.test, decoding)
        return 100 * sum(right) / (len(right) * decoding.samples)
