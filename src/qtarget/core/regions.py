"""Rules for samples of a policy: the ratio to the policy that sampled, and how far the live one has moved from it.

Everything here is about one token. ``pi`` is the live probability of the sampled token, ``mu`` that of the policy that
sampled, ``r = pi / mu``, ``A`` the advantage. Where no rollout is given the sampler was the live model as it is: ``r`` is
exactly 1 and nothing has moved, but ``r`` still has its gradient.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, get_args

import torch

from qtarget.core.checks import in_range, one_of
from qtarget.core.products import weighted
from qtarget.core.residuals import expectation
from qtarget.core.shapes import Bool, Float, Tensor
from qtarget.core.types import Needs, Target, Terms, TokenView

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before the exponential, as in every public implementation."""
OutcomesSeen = Literal["binary", "listed"]
"""On what a divergence is taken: the sampled token against all others, or all that the rollout lists and its tail."""


class TrustRegion(Target):
    """How far a sample is trusted: ``g = w r A (p - d_y)`` with a weight ``w`` that the rule chooses, so ``a = w r A``.

    All rules are homogeneous in ``A``, and at ``r = 1`` all have the gradient of policy gradient, ``w = 1``.
    """

    @property
    def needs(self) -> Needs:
        return Needs(advantages=True)

    @abstractmethod
    def losses(self, x: TokenView) -> Terms:
        """The paper's loss at each token, with the paper's stop-gradients."""


class DivergenceRegion(TrustRegion):
    """A region in a divergence: ``L = -sg(min(r, C) M) A log pi``, ``M = 0`` where the token left the region outwards.

    Subclasses are dataclasses with the fields ``delta_low``, ``delta_high``, ``max_ratio`` and ``outcomes``.
    """

    delta_low: float
    delta_high: float
    max_ratio: float
    outcomes: str

    def __post_init__(self) -> None:
        for field in ("delta_low", "delta_high"):
            in_range(self, field, 0, open_low=True, infinite=True)
        in_range(self, "max_ratio", 1, infinite=True)
        one_of(self, "outcomes", get_args(OutcomesSeen))

    @property
    def needs(self) -> Needs:
        rollout = frozenset({"distribution"}) if self.outcomes == "listed" else frozenset()
        return Needs(advantages=True, rollout=rollout)

    @abstractmethod
    def moved(self, x: TokenView) -> Float[Tensor, " tokens"]:
        """The divergence of live and sampling policy at each token, detached."""

    def losses(self, x: TokenView) -> Terms:
        gap = log_ratio(x).detach()
        kept = inside(advantages(x), gap, self.moved(x), self.delta_low, self.delta_high)
        weight = gap.exp().clamp(max=self.max_ratio) * kept * advantages(x)
        return Terms(label=-weighted_log_probs(weight, x))


def weighted_log_probs(weight: Float[Tensor, " tokens"], x: TokenView) -> Float[Tensor, " tokens"]:
    """``weight log pi``, 0 where the weight is."""
    return weighted(weight, x.label_log_probs)


def advantages(x: TokenView) -> Float[Tensor, " tokens"]:
    """The advantages; that they are there was checked before."""
    assert x.advantages is not None
    return x.advantages


def rollout_log_probs(x: TokenView) -> Float[Tensor, " tokens"]:
    """``log mu`` of the sampled tokens, detached."""
    if x.rollout is None:
        return x.label_log_probs.detach()
    assert x.rollout.label_log_probs is not None
    return x.rollout.label_log_probs


def log_ratio(x: TokenView) -> Float[Tensor, " tokens"]:
    """``log r``, clamped to 20 either way; its gradient is that of ``log pi``."""
    return (x.label_log_probs - rollout_log_probs(x)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def inside(
    advantages: Float[Tensor, " tokens"],
    log_ratio: Float[Tensor, " tokens"],
    moved: Float[Tensor, " tokens"],
    delta_low: float,
    delta_high: float,
) -> Bool[Tensor, " tokens"]:
    """False where the gradient would push a token further out: up beyond ``delta_high``, or down beyond ``delta_low``.

    An advantage of 0 belongs to neither side.
    """
    out_above = (advantages > 0) & (log_ratio > 0) & (moved > delta_high)
    out_below = (advantages < 0) & (log_ratio < 0) & (moved > delta_low)
    return ~(out_above | out_below)


def total_variation(x: TokenView, outcomes: str) -> Float[Tensor, " tokens"]:
    """Total variation of live and sampling policy: ``|pi - mu|``, or half the sum over the outcomes listed."""
    if outcomes == "binary" or x.on_rollout is None:
        return (x.label_log_probs.detach().exp() - rollout_log_probs(x).exp()).abs()
    return (x.on_rollout.model.exp() - x.on_rollout.frozen.exp()).abs().sum(-1) / 2


def rollout_kl(x: TokenView, outcomes: str) -> Float[Tensor, " tokens"]:
    """``KL(mu || pi)`` in nats: of the sampled token against all others, or over the outcomes listed."""
    if outcomes == "binary" or x.on_rollout is None:
        return binary_kl(rollout_log_probs(x), x.label_log_probs.detach())
    pair = x.on_rollout
    return expectation(pair.frozen, pair.frozen - pair.model)


def binary_kl(first: Float[Tensor, " tokens"], second: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """``KL`` of two coins given by the log-probs of heads, nats.

    ``log(1 - p)`` is ``log1p(-exp(log p))`` of a log-prob that is below 0 by at least the dtype's resolution: public code adds
    1e-8 to both probabilities, which float32 drops beside 1.

    Example:
        >>> import torch
        >>> binary_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # log(2) / 2 + log(2/3) / 2
        tensor([0.1438])
    """
    smallest = -torch.finfo(first.dtype).eps
    first, second = first.clamp(max=smallest), second.clamp(max=smallest)
    tails = [torch.log1p(-value.exp()) for value in (first, second)]
    return first.exp() * (first - second) + tails[0].exp() * (tails[0] - tails[1])
