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

from qtarget.api import linear_target_loss
from qtarget.benchmarks.finetune import Encoded, Recipe, collate, encode, fine_tune, hidden_states
from qtarget.benchmarks.generation import accuracy_percent
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import BATCH_SIZE, TaskSet, generated_demonstrations, task_set, teach
from qtarget.core.types import FrozenHead, Reference
from qtarget.data import tasks
from qtarget.evaluation.generation import GREEDY, Decoding, complete, quiet
from qtarget.registry import get_target
from qtarget.storage.models import save_whole

PROMPTS, GROUP, NEW_TOKENS, MAX_NORM = 16, 8, 24, 1.0
"""Prompts a round, samples of each, longest sample in tokens, and the norm to which gradients are clipped."""
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


@dataclass(frozen=True)
class Round:
    """Samples of one round.

    Attributes:
        rows: prompts and completions as ids.
        rewards: ``[samples]`` 1 for a right answer; the samples of a prompt stand together.
        log_probs: of each row's completion tokens, under the weights that sampled.
    """

    rows: list[Encoded]
    rewards: torch.Tensor
    log_probs: list[torch.Tensor]

    @property
    def advantages(self) -> torch.Tensor:
        """``[samples]`` reward less the mean of the prompt's samples."""
        groups = self.rewards.view(-1, GROUP)
        return (groups - groups.mean(1, keepdim=True)).flatten()


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
        rewards, moved, blocked = [], [], []
        shuffle = torch.Generator().manual_seed(seed)
        for number in range(self.rounds):
            old.append(copy.deepcopy(model).eval() if way.age else model)
            prompts = asked[number * PROMPTS : (number + 1) * PROMPTS]
            drawn = sample_round(old[0], self.tokenizer, prompts, seed * 10_000 + number)
            rewards.append(float(drawn.rewards.mean()))
            for part in torch.randperm(len(drawn.rows), generator=shuffle).chunk(way.updates):
                kl, share = update(model, optimizer, way, drawn, part.tolist(), self.teacher)
                moved.append(kl)
                blocked.append(share)
        return {"reward": rewards, "kl_k3": fmean(moved), "blocked": fmean(blocked)}

    def score(self, model: Any) -> dict[str, float]:
        """Percent of held-out prompts answered exactly: by samples at temperature 1, and by the likeliest tokens."""
        sampled = Decoding(temperature=1.0, samples=self.draws)
        return {"sampled_percent": self.accuracy(model, sampled), "greedy_percent": self.accuracy(model, GREEDY)}

    def accuracy(self, model: Any, decoding: Decoding) -> float:
        """In percent, over prompts and draws."""
        rows, texts = sorted(self.test, key=lambda row: len(row["prompt"])), []
        for start in range(0, len(rows), 64):
            ids = self.tokenizer([row["prompt"] for row in rows[start : start + 64]])["input_ids"]
            said = complete(
                model, self.tokenizer, ids, max_new_tokens=NEW_TOKENS, stops=[self.tokenizer.eos_token_id],
                decoding=decoding, stream=start,
            )  # fmt: skip
            texts += [one.text for answers in said for one in answers]
        return accuracy_percent([row for row in rows for _ in range(decoding.samples)], texts, tasks.check)


@torch.no_grad()
def sample_round(model: Any, tokenizer: Any, prompts: Sequence[Mapping[str, Any]], seed: int) -> Round:
    """``GROUP`` samples of each prompt at temperature 1, with rewards and the sampler's log-probs."""
    end = tokenizer.eos_token_id
    encoded = tokenizer([row["prompt"] for row in prompts], return_tensors="pt", padding=True, padding_side="left")
    with torch.random.fork_rng([]), quiet("transformers.generation"):
        torch.manual_seed(seed)
        out = model.eval().generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], do_sample=True, top_k=0,
            max_new_tokens=NEW_TOKENS, num_return_sequences=GROUP, eos_token_id=end, pad_token_id=end,
        )  # fmt: skip
    said = [up_to(ids, end) for ids in out[:, encoded["input_ids"].shape[1] :].tolist()]
    before = [ids for ids in tokenizer([row["prompt"] for row in prompts])["input_ids"] for _ in range(GROUP)]
    rows = [Encoded(prompt, ids, []) for prompt, ids in zip(before, said, strict=True)]
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    asked = [row for row in prompts for _ in range(GROUP)]
    rewards = torch.tensor([float(tasks.check(row, text)) for row, text in zip(asked, texts, strict=True)])
    ids, labels = collate(rows)
    kept = labels >= 0
    scores = (hidden_states(model, ids)[kept] @ model.lm_head.weight.T).log_softmax(-1)
    flat = scores.gather(-1, labels[kept][:, None])[:, 0]
    return Round(rows, rewards, list(flat.split([len(row.completion) for row in rows])))


def up_to(ids: Sequence[int], end: int) -> list[int]:
    """The ids up to the first ``end``, with it.

    Example:
        >>> up_to([5, 6, 0, 0], 0)
        [5, 6, 0]
    """
    return list(ids[: ids.index(end) + 1]) if end in ids else list(ids)


def update(
    model: Any, optimizer: torch.optim.Optimizer, way: Way, drawn: Round, part: Sequence[int], teacher: Any
) -> tuple[float, float]:
    """One optimizer step on some samples; returns the KL to the sampler (k3, nats a token) and the share blocked."""
    rows = [drawn.rows[i] for i in part]
    ids, labels = collate(rows)
    kept = labels >= 0
    target, sampler = get_target(way.target), torch.cat([drawn.log_probs[i] for i in part])
    advantages = drawn.advantages[list(part)].repeat_interleave(kept.sum(-1))
    regional, frozen = target.needs.advantages, None
    if target.needs.teacher:
        with torch.no_grad():
            frozen = FrozenHead(hidden_states(teacher, ids)[kept], teacher.lm_head.weight)
    loss, report = linear_target_loss(
        hidden_states(model, ids)[kept], model.lm_head.weight, labels[kept], target, teacher=frozen,
        advantages=advantages if regional else None,
        # samples of the live weights have a ratio of 1, to the bit
        rollout=Reference(label_log_probs=sampler) if regional and way.age else None, return_report=True,
    )  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    gap = (report.label_log_probs - sampler).clamp(-20, 20)
    weighed = advantages != 0
    share = float((report.label_weights[weighed] == 0).float().mean()) if regional and bool(weighed.any()) else 0.0
    return float((torch.expm1(gap) - gap).mean()), share
