"""One run: rounds of sampling from old or noisy weights, each used for some epochs."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from qtarget.api import target_loss
from qtarget.benchmarks.staleness.rules import rule
from qtarget.benchmarks.staleness.toy import Samples, pretrained, prompts, sample, success
from qtarget.core.types import Reference, Target

PROMPTS, GROUP, MINIBATCHES, MAX_NORM = 16, 8, 2, 1.0


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
    """A run: where, by which rule and threshold, at which rate, with which seed."""

    point: Point
    rule: str
    value: float
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        p = self.point
        return f"{p.lag}/{p.epochs}/{p.mismatch}/{self.rule}/{self.value}/{self.learning_rate}/{self.seed}"


class StalenessWorker:
    """Runs jobs; the start of a seed is made once and serves all rules.

    Args:
        rounds: of sampling, in every run.
        sft_steps: supervised steps of the start.
    """

    def __init__(self, rounds: int, sft_steps: int) -> None:
        self.rounds, self.sft_steps = rounds, sft_steps
        self._starts: dict[int, torch.nn.Module] = {}

    def start(self, seed: int) -> torch.nn.Module:
        """The policy that runs of this seed begin with, a copy."""
        if seed not in self._starts:
            self._starts[seed] = pretrained(seed, self.sft_steps)
        return copy.deepcopy(self._starts[seed])

    def __call__(self, job: Job) -> dict[str, Any]:
        """Success before and after, its mean over rounds, KL to the sampler (k3, nats a token), share blocked."""
        policy, generator = self.start(job.seed), torch.Generator().manual_seed(10_000 + job.seed)
        optimizer = torch.optim.Adam(policy.parameters(), lr=job.learning_rate)
        target, before = rule(job.rule, job.value), success(policy)
        ring: deque[dict[str, Any]] = deque(maxlen=job.point.lag + 1)
        sampler, curve, kls, blocked = copy.deepcopy(policy), [], [], []
        for _ in range(self.rounds):
            ring.append({name: value.clone() for name, value in policy.state_dict().items()})
            sampler.load_state_dict(ring[0])  # of ``lag`` rounds ago, or of the start
            asked = prompts(PROMPTS, generator).repeat_interleave(GROUP, 0)
            drawn = sample(sampler, asked, job.point.mismatch, generator)
            for _ in range(job.point.epochs):
                for part in torch.randperm(len(asked), generator=generator).chunk(MINIBATCHES):
                    kl, share = update(policy, optimizer, target, drawn, part)
                    kls.append(kl)
                    blocked.append(share)
            curve.append(success(policy))
        return {
            "start": before,
            "end": curve[-1],
            "mean": sum(curve) / len(curve),
            "kl_k3": sum(kls) / len(kls),
            "blocked": sum(blocked) / len(blocked),
        }


def update(
    policy: torch.nn.Module, optimizer: torch.optim.Optimizer, target: Target, drawn: Samples, part: torch.Tensor
) -> tuple[float, float]:
    """One optimizer step on some answers; returns the KL to the sampler and the share of tokens that were blocked."""
    rewards = drawn.rewards.view(-1, GROUP)
    advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()[part]
    loss, report = target_loss(
        policy(drawn.states[part]),
        drawn.digits[part],
        target,
        advantages=advantages[:, None].expand(-1, drawn.digits.shape[1]),
        rollout=Reference(label_log_probs=drawn.log_probs[part]),
        return_report=True,
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_NORM)
    optimizer.step()
    gap = (report.label_log_probs - drawn.log_probs[part]).clamp(-20, 20)
    weighed = (advantages != 0)[:, None].expand_as(gap)
    share = float((report.label_weights[weighed] == 0).float().mean()) if bool(weighed.any()) else 0.0
    return float((torch.expm1(gap) - gap).mean()), share
