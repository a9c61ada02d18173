"""One run: rounds of sampling from old or noisy weights, each used for some epochs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from qtarget.api import target_loss
from qtarget.benchmarks.staleness.penalties import WHOLE, kl_to_start, sampled_penalty, with_penalty
from qtarget.benchmarks.staleness.rules import rule
from qtarget.benchmarks.staleness.toy import Samples, SideBySide, pretrained, prompts, sample, success
from qtarget.core.types import Reference

PROMPTS, GROUP, MINIBATCHES, MAX_NORM = 16, 8, 2, 1.0
TUNING_SEED = 1000
"""Seeds from here on choose learning rates, those below are of the final runs."""
EVALUATE_EVERY = 8
"""Rounds between two points of the curve whose mean is reported."""


@dataclass(frozen=True)
class Point:
    """How the data is off: weights of ``lag`` rounds ago sample, ``epochs`` over each batch, noise of ``mismatch`` on logits."""

    lag: int = 0
    epochs: int = 1
    mismatch: float = 0.0

    def __str__(self) -> str:
        return f"lag {self.lag}, {self.epochs} epoch{'s' * (self.epochs != 1)}, mismatch {self.mismatch:g}"


@dataclass(frozen=True)
class Job:
    """Runs of some seeds: where, by which rule and threshold, at which rate; and a penalty, where they have one."""

    point: Point
    rule: str
    value: float
    learning_rate: float
    seeds: tuple[int, ...]
    penalty: str | None = None
    weight: float = 0.0

    @property
    def key(self) -> str:
        p, beside = self.point, f"/{self.penalty}/{self.weight}" if self.penalty else ""
        seeds = ",".join(map(str, self.seeds))
        return f"{p.lag}/{p.epochs}/{p.mismatch}/{self.rule}/{self.value}/{self.learning_rate}{beside}/{seeds}"


class StalenessWorker:
    """Runs jobs; the start of a seed is made once and serves all rules.

    Args:
        rounds: of sampling, in every run.
        sft_steps: supervised steps of the start.
    """

    def __init__(self, rounds: int, sft_steps: int) -> None:
        self.rounds, self.sft_steps = rounds, sft_steps
        self._starts: dict[int, torch.nn.Module] = {}

    def start(self, seeds: tuple[int, ...]) -> SideBySide:
        """The policies that runs of these seeds begin with, a copy."""
        for seed in seeds:
            if seed not in self._starts:
                self._starts[seed] = pretrained(seed, self.sft_steps)
        return SideBySide([self._starts[seed] for seed in seeds])

    def __call__(self, job: Job) -> dict[str, Any]:
        """``runs``, one of each seed: success before and after, its mean over the run, KL to the sampler (k3, nats a token), share
        blocked, and KL to the start (nats an answer)."""
        policy, start, count = self.start(job.seeds), self.start(job.seeds), len(job.seeds)
        generators = [torch.Generator().manual_seed(10_000 + seed) for seed in job.seeds]
        objective, optimizer = Objective(job, start), torch.optim.Adam(policy.parameters(), lr=job.learning_rate)
        ring: deque[dict[str, Any]] = deque(maxlen=job.point.lag + 1)
        sampler, before, curve, seen = self.start(job.seeds), success(policy, count), [], []
        for number in range(1, self.rounds + 1):
            ring.append({name: value.clone() for name, value in policy.state_dict().items()})
            sampler.load_state_dict(ring[0])  # of ``lag`` rounds ago, or of the start
            asked = torch.stack([prompts(PROMPTS, g) for g in generators]).repeat_interleave(GROUP, 1)
            drawn = sample(sampler, asked, job.point.mismatch, generators)
            for _ in range(job.point.epochs):
                order = torch.stack([torch.randperm(PROMPTS * GROUP, generator=g) for g in generators])
                seen += [update(policy, optimizer, objective, drawn, part) for part in order.chunk(MINIBATCHES, 1)]
            if number % EVALUATE_EVERY == 0 or number == self.rounds:
                curve.append(torch.tensor(success(policy, count)))
        columns = {
            "start": before,
            "end": curve[-1].tolist(),
            "mean": torch.stack(curve).mean(0).tolist(),
            "kl_k3": torch.stack([kl for kl, _ in seen]).mean(0).tolist(),
            "blocked": torch.stack([share for _, share in seen]).mean(0).tolist(),
            "kl_to_start": kl_to_start(policy, start, count),
        }
        return {"runs": [{name: values[i] for name, values in columns.items()} for i in range(count)]}


class Objective:
    """The loss of a job: the mean over the tokens of each seed, summed over seeds.

    Args:
        start: the policies before the run, to which a penalty is.
    """

    def __init__(self, job: Job, start: SideBySide) -> None:
        self.job, self.start = job, start
        self.target = with_penalty(rule(job.rule, job.value), job.penalty, job.weight)

    def __call__(self, policy: SideBySide, drawn: Samples, advantages: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Loss and report of some answers; ``advantages`` ``[seeds, answers]``."""
        logits, known, before = policy(drawn.states), None, None
        if self.job.penalty:
            with torch.no_grad():
                before = self.start(drawn.states).log_softmax(-1)
            known = Reference(log_probs=before) if self.job.penalty == WHOLE else None
        loss, report = target_loss(
            logits, drawn.digits, self.target, teacher=known, advantages=advantages[..., None].expand(drawn.digits.shape),
            rollout=Reference(label_log_probs=drawn.log_probs), return_report=True,
        )  # fmt: skip
        if before is not None:
            live, start = (v.gather(-1, drawn.digits[..., None])[..., 0] for v in (logits.log_softmax(-1), before))
            loss = loss + sampled_penalty(self.job.penalty, self.job.weight, live, start)
        return len(advantages) * loss, report


def update(
    policy: SideBySide, optimizer: torch.optim.Optimizer, objective: Objective, drawn: Samples, part: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on some answers ``[seeds, part]``; by seed the KL to the sampler and the share of tokens blocked."""
    rewards = drawn.rewards.unflatten(1, (-1, GROUP))
    advantages = (rewards - rewards.mean(-1, keepdim=True)).flatten(1).gather(1, part)
    chosen = drawn.part(part)
    loss, report = objective(policy, chosen, advantages)
    optimizer.zero_grad()
    loss.backward()
    clip(policy)
    optimizer.step()
    gap = (report.label_log_probs - chosen.log_probs).clamp(-20, 20)
    weighed = (advantages != 0)[..., None].expand_as(gap)
    blocked = (weighed & (report.label_weights == 0)).sum((1, 2)) / weighed.sum((1, 2)).clamp(min=1)
    return (torch.expm1(gap) - gap).mean((1, 2)), blocked


def clip(policy: SideBySide) -> None:
    """Shrink each seed's gradient to ``MAX_NORM``, where it is longer."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).pow(2).sum(1) for g in gradients]).sum(0).sqrt()
    factor = (MAX_NORM / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))
