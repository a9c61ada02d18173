"""A policy of nine thousand parameters that writes four digits in order; its success is computed, not sampled.

The state holds which digits were asked and written, and the place. The right next digit is the smallest that is left. So
the probability of a right answer is a product of four probabilities along one path, and evaluation has no noise.

A step of so small a policy is all overhead, so that the policies of several seeds run side by side, each with weights,
prompts and draws of its own; every function takes leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qtarget.core.shapes import Float, Int, Tensor

DIGITS, LENGTH, WIDTH = 10, 4, 256
TEST_PROMPTS = 512


@dataclass(frozen=True)
class Samples:
    """Answers: states ``[seeds, answers, LENGTH, features]``, digits and the sampler's log-probs ``[seeds, answers, LENGTH]``."""

    states: Tensor
    digits: Int[Tensor, "seeds answers length"]
    log_probs: Float[Tensor, "seeds answers length"]
    rewards: Float[Tensor, "seeds answers"]

    def part(self, chosen: Int[Tensor, "seeds part"]) -> Samples:
        """Some answers of each seed."""
        rows = torch.arange(len(chosen))[:, None]
        return Samples(*(getattr(self, name)[rows, chosen] for name in ("states", "digits", "log_probs", "rewards")))


class SideBySide(torch.nn.Module):
    """Policies of several seeds: ``[seeds, ..., features]`` to logits ``[seeds, ..., DIGITS]``; no seed sees another.

    Args:
        policies: of ``make_policy``.
    """

    def __init__(self, policies: list[torch.nn.Module]) -> None:
        super().__init__()
        states: Any = [policy.state_dict() for policy in policies]
        stacked = {name.replace(".", "_"): torch.stack([state[name] for state in states]) for name in states[0]}
        self.weights = torch.nn.ParameterDict(stacked)

    def forward(self, states: Tensor) -> Tensor:
        w, flat = self.weights, states.flatten(1, -2)
        inner = torch.baddbmm(w["0_bias"][:, None], flat, w["0_weight"].mT).tanh()
        return torch.baddbmm(w["2_bias"][:, None], inner, w["2_weight"].mT).unflatten(1, states.shape[1:-1])


def make_policy(seed: int) -> torch.nn.Module:
    """A random policy, 8,970 parameters."""
    torch.manual_seed(seed)
    features = 2 * DIGITS + LENGTH
    return torch.nn.Sequential(torch.nn.Linear(features, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, DIGITS))


def prompts(count: int, generator: torch.Generator) -> Int[Tensor, "prompts length"]:
    """Four digits each, in any order, repeats allowed."""
    return torch.randint(DIGITS, (count, LENGTH), generator=generator)


def counts(digits: Int[Tensor, "... places"]) -> Float[Tensor, "... digits"]:
    """How often each digit stands in a row."""
    return torch.nn.functional.one_hot(digits, DIGITS).sum(-2).float()


def state(asked: Float[Tensor, "... digits"], written: Float[Tensor, "... digits"], place: int) -> Tensor:
    """What the policy sees before it writes the digit at ``place``."""
    where = torch.nn.functional.one_hot(torch.tensor(place), LENGTH).float().expand(*asked.shape[:-1], -1)
    return torch.cat([asked, written, where], dim=-1)


def along(asked: Int[Tensor, "... length"], digits: Int[Tensor, "... length"]) -> Float[Tensor, "... length features"]:
    """The states that writing ``digits`` passes through."""
    total = counts(asked)
    return torch.stack([state(total, counts(digits[..., :place]), place) for place in range(LENGTH)], dim=-2)


def drawn(shape: tuple[int, ...], generators: list[torch.Generator], draw: Any = torch.rand) -> Tensor:
    """Random numbers ``[seeds, *shape]``, those of a seed from its own generator."""
    return torch.stack([draw(shape, generator=generator) for generator in generators])


@torch.no_grad()
def sample(
    policy: torch.nn.Module, asked: Int[Tensor, "seeds rows length"], noise: float, generators: list[torch.Generator]
) -> Samples:
    """An answer to each prompt; the sampler's logits are off by Gaussian noise, and it tells its own log-probs exactly."""
    total, written = counts(asked), torch.zeros(*asked.shape[:-1], DIGITS)
    states, digits, log_probs = [], [], []
    for place in range(LENGTH):
        states.append(state(total, written, place))
        logits = policy(states[-1])
        if noise:
            logits = logits + noise * drawn(tuple(logits.shape[1:]), generators, torch.randn)
        distribution = logits.log_softmax(-1)
        below = distribution.exp().cumsum(-1) < drawn((asked.shape[1], 1), generators)
        digits.append(below.sum(-1).clamp(max=DIGITS - 1))  # the sum of all may be a little below 1
        log_probs.append(distribution.gather(-1, digits[-1][..., None])[..., 0])
        written = written + torch.nn.functional.one_hot(digits[-1], DIGITS)
    answer = torch.stack(digits, -1)
    right = (answer == asked.sort(dim=-1).values).all(-1).float()
    return Samples(torch.stack(states, -2), answer, torch.stack(log_probs, -1), right)


@torch.no_grad()
def success(policy: torch.nn.Module, seeds: int) -> list[float]:
    """Each seed's mean probability of the right answer, over fixed prompts that no training draws."""
    asked = prompts(TEST_PROMPTS, torch.Generator().manual_seed(987_654_321)).expand(seeds, -1, -1)
    right = asked.sort(dim=-1).values
    log_probs = policy(along(asked, right)).log_softmax(-1).gather(-1, right[..., None])[..., 0]
    return log_probs.sum(-1).exp().mean(-1).tolist()


def pretrained(seed: int, steps: int, batch: int = 64, learning_rate: float = 3e-3) -> torch.nn.Module:
    """A policy after ``steps`` of supervised training: good, and not done."""
    policy, generator = make_policy(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    for _ in range(steps):
        asked = prompts(batch, generator)
        right = asked.sort(dim=-1).values
        loss = torch.nn.functional.cross_entropy(policy(along(asked, right)).flatten(0, 1), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy
