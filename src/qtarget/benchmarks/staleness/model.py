"""The same runs on a language model: the embedded base, whose held-out answers are drawn and counted."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from qtarget.benchmarks.sampling import GROUP, right_answers, sample_round, update
from qtarget.benchmarks.staleness.rules import rule
from qtarget.benchmarks.staleness.runs import TUNING_SEED, Job
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import Row, generated_demonstrations, task_set, teach
from qtarget.core.errors import ConfigError
from qtarget.evaluation.generation import GREEDY, Decoding

TUNING_PROMPTS = 100
"""Of the validation rows: runs that choose a learning rate are judged on them, and not on held-out ones."""


class ModelWorker:
    """Runs jobs on the embedded base after ``sft_steps`` supervised steps; one update a round and epoch.

    Args:
        rounds: of sampling, in every run.
        sft_steps: supervised steps of 16 rows behind the start.
        prompts: of a round; each is answered ``GROUP`` times.
        test_rows: held-out prompts.
        draws: samples of each, at temperature 1.

    Attributes:
        start: shares of right answers of the start, drawn and greedy.
    """

    def __init__(self, rounds: int, sft_steps: int, prompts: int, test_rows: int, draws: int) -> None:
        self.rounds, self.prompts, self.draws = rounds, prompts, draws
        self.task, self.tokenizer = task_set("embedded", None), Start().tokenizer()
        self.test, self.validation = self.task.test[:test_rows], self.task.validation[:TUNING_PROMPTS]
        self.taken = {row["prompt"] for row in (*self.task.test, *self.task.validation)}
        self.first = Start().load()
        teach(self.first, Start(), self.task.warmup, sft_steps)
        # here, and not where it is first asked for: that run's seconds would hold it
        found = self.scores(self.first)
        self.start = found["end"], sum(found["right_greedy"]) / len(self.test)

    def __call__(self, job: Job) -> dict[str, Any]:
        """``runs``, one of each seed."""
        return {"runs": [self.run(job, seed) for seed in job.seeds]}

    def run(self, job: Job, seed: int) -> dict[str, Any]:
        """``end``: the share of right answers among those drawn, and ``start``, the same before the run.

        On held-out prompts also right answers to each, drawn and greedy. Reward by round, KL to the sampler (k3, nats a token),
        share blocked, CPU seconds.
        """
        begin, model = time.process_time(), copy.deepcopy(self.first)
        seen = self.improve(model, job, seed)
        if seed >= TUNING_SEED:
            found: dict[str, Any] = {"end": self.share(self.drawn(model, self.validation))}
        else:
            found = self.scores(model)
            found["start"], found["start_greedy"] = self.start
        return found | seen | {"cpu_seconds": round(time.process_time() - begin, 1)}

    def scores(self, model: Any) -> dict[str, Any]:
        """Held-out prompts, answered by draws and by the likeliest tokens."""
        sampled, greedy = self.drawn(model, self.test), right_answers(model, self.tokenizer, self.test, GREEDY)
        return {"end": self.share(sampled), "right_sampled": sampled, "right_greedy": greedy}

    def improve(self, model: Any, job: Job, seed: int) -> dict[str, Any]:
        """Sample and update, round by round."""
        if job.point.mismatch or job.penalty:
            raise ConfigError(
                f"{job.point}, penalty {job.penalty}: on the model only lag and epochs are varied; leave both out"
            )
        asked = generated_demonstrations(self.rounds * self.prompts, f"staleness {seed}", self.taken)
        optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.0)
        old: deque[Any] = deque(maxlen=job.point.lag + 1)
        target, rewards, moved, blocked = rule(job.rule, job.value), [], [], []
        every = range(self.prompts * GROUP)
        for number in range(self.rounds):
            old.append(copy.deepcopy(model).eval() if job.point.lag else model)
            chosen = asked[number * self.prompts : (number + 1) * self.prompts]
            drawn = sample_round(old[0], self.tokenizer, chosen, seed * 10_000 + number)
            rewards.append(round(float(drawn.rewards.mean()), 4))
            for epoch in range(job.point.epochs):
                is_live = not job.point.lag and not epoch
                kl, share = update(model, optimizer, target, drawn, every, is_live=is_live)
                moved.append(kl)
                blocked.append(share)
        return {"reward": rewards, "kl_k3": fmean(moved), "blocked": fmean(blocked)}

    def drawn(self, model: Any, rows: Sequence[Row]) -> list[int]:
        """Right answers to each prompt among those drawn at temperature 1."""
        return right_answers(model, self.tokenizer, rows, Decoding(temperature=1.0, samples=self.draws))

    def share(self, right: list[int]) -> float:
        """Of all drawn answers."""
        return sum(right) / (len(right) * self.draws)
