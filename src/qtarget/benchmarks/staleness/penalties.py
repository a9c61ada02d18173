"""What holds a policy near its start while samples grow old: KL penalties of the sampled token, and over all outcomes.

The sampled ones are what trainers have put into their losses; they stand here to be measured, not to be used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from qtarget.benchmarks.staleness.toy import LENGTH, along, prompts, sample
from qtarget.composed.regularised import Regularised
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import Target
from qtarget.registry import get_target

WHOLE = "full vocabulary"
SAMPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda gap: gap,
    "k3": lambda gap: torch.exp(-gap) + gap - 1,
}
"""By name, of ``log pi - log pi_start`` at the sampled token."""
PENALTIES = (*SAMPLED, WHOLE)


def with_penalty(region: Target, penalty: str | None, weight: float) -> Target:
    """What the loss is asked for: the region, with the penalty where that is a target."""
    return Regularised(region, get_target("reverse_kl"), weight) if penalty == WHOLE else region


def sampled_penalty(
    penalty: str | None, weight: float, log_probs: Float[Tensor, "..."], start: Float[Tensor, "..."]
) -> Tensor | float:
    """What is added to the loss beside it: a mean over the sampled tokens, 0 where the target holds it already.

    Example:
        >>> float(sampled_penalty("k1", 0.5, torch.tensor([-1.0]), torch.tensor([-3.0])))
        1.0
    """
    if penalty not in SAMPLED:
        return 0.0
    gap = (log_probs - start).clamp(-20, 20)
    return weight * SAMPLED[penalty](gap).mean()


@torch.no_grad()
def kl_to_start(policy: torch.nn.Module, start: torch.nn.Module, seeds: int) -> list[float]:
    """``KL(policy || start)`` of an answer in nats, by seed: exact at each state, over 512 of the policy's own answers."""
    generators = [torch.Generator().manual_seed(123_456_789) for _ in range(seeds)]
    asked = prompts(512, torch.Generator().manual_seed(123_456_789)).expand(seeds, -1, -1)
    states = along(asked, sample(policy, asked, 0.0, generators).digits)
    live, before = policy(states).log_softmax(-1), start(states).log_softmax(-1)
    return (LENGTH * (live.exp() * (live - before)).sum(-1).mean((1, 2))).tolist()
