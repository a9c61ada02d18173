"""A policy of nine thousand parameters that writes four digits in order; its success is computed, not sampled.

The state holds which digits were asked and written, and the place. The right next digit is the smallest that is left. So
the probability of a right answer is a product of four probabilities along one path, and evaluation has no noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.shapes import Float, Int, Tensor

DIGITS, LENGTH, WIDTH = 10, 4, 256
TEST_PROMPTS = 512


@dataclass(frozen=True)
class Samples:
    """Answers to prompts: states ``[answers, LENGTH, features]``, digits and the sampler's log-probs ``[answers, LENGTH]``."""

    states: Tensor
    digits: Int[Tensor, "answers length"]
    log_probs: Float[Tensor, "answers length"]
    rewards: Float[Tensor, " answers"]


def make_policy(seed: int) -> torch.nn.Module:
    """A random policy, 8,970 parameters."""
    torch.manual_seed(seed)
    features = 2 * DIGITS + LENGTH
    return torch.nn.Sequential(torch.nn.Linear(features, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, DIGITS))


def prompts(count: int, generator: torch.Generator) -> Int[Tensor, "prompts length"]:
    """Four digits each, in any order, repeats allowed."""
    return torch.randint(DIGITS, (count, LENGTH), generator=generator)


def counts(digits: Int[Tensor, "rows places"]) -> Float[Tensor, "rows digits"]:
    """How often each digit stands in a row."""
    return torch.nn.functional.one_hot(digits, DIGITS).sum(1).float()


def state(asked: Float[Tensor, "rows digits"], written: Float[Tensor, "rows digits"], place: int) -> Tensor:
    """What the policy sees before it writes the digit at ``place``."""
    where = torch.nn.functional.one_hot(torch.tensor(place), LENGTH).float().expand(len(asked), -1)
    return torch.cat([asked, written, where], dim=-1)


def along(
    asked: Int[Tensor, "rows length"], digits: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows length features"]:
    """The states that writing ``digits`` passes through."""
    total = counts(asked)
    return torch.stack([state(total, counts(digits[:, :place]), place) for place in range(LENGTH)], dim=1)


@torch.no_grad()
def sample(
    policy: torch.nn.Module, asked: Int[Tensor, "rows length"], noise: float, generator: torch.Generator
) -> Samples:
    """An answer to each prompt; the sampler's logits are off by Gaussian noise, and it tells its own log-probs exactly."""
    total, written = counts(asked), torch.zeros(len(asked), DIGITS)
    states, digits, log_probs = [], [], []
    for place in range(LENGTH):
        states.append(state(total, written, place))
        logits = policy(states[-1])
        if noise:
            logits = logits + noise * torch.randn(logits.shape, generator=generator)
        distribution = logits.log_softmax(-1)
        digits.append(torch.multinomial(distribution.exp(), 1, generator=generator)[:, 0])
        log_probs.append(distribution.gather(-1, digits[-1][:, None])[:, 0])
        written = written + torch.nn.functional.one_hot(digits[-1], DIGITS)
    answer = torch.stack(digits, 1)
    right = (answer == asked.sort(dim=-1).values).all(-1).float()
    return Samples(torch.stack(states, 1), answer, torch.stack(log_probs, 1), right)


@torch.no_grad()
def success(policy: torch.nn.Module) -> float:
    """Mean probability of the right answer over fixed prompts that no training draws."""
    asked = prompts(TEST_PROMPTS, torch.Generator().manual_seed(987_654_321))
    right = asked.sort(dim=-1).values
    log_probs = policy(along(asked, right)).log_softmax(-1).gather(-1, right[..., None])[..., 0]
    return float(log_probs.sum(-1).exp().mean())


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
