"""DRPO: a quadratic price on the distance moved, in place of DPPO's mask."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.regions import TrustRegion, advantages, log_ratio, rollout_log_probs
from qtarget.core.types import Terms, TokenView


@dataclass(frozen=True)
class DRPO(TrustRegion):
    """``L = -r A + |A| mu (r - 1)^2 / (2 delta)``; ``a = w r A``, ``w = 1 - sign(A (r - 1)) |pi - mu| / delta``.

    A token that left the region outwards is pulled back (``w < 0``), one that comes back is helped (``w > 1``).

    Args:
        delta: above 0, infinity for no region; the published 12.5 leaves weights within [0.92, 1.08], nearly no region;
            0.5 is ours.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.4]).log())
        >>> rule = qtarget.get_target("drpo")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(-1.2250)

    Reference: arXiv 2606.09821 (formula from the authors' released code). Deviations: ``|log r|`` is at most 20.
    """

    delta: float = 0.5

    name = "drpo"
    formula = "-r A + |A| mu (r - 1)^2 / (2 delta)"
    paper = "2606.09821"

    def __post_init__(self) -> None:
        in_range(self, "delta", 0, open_low=True, infinite=True)

    def losses(self, x: TokenView) -> Terms:
        ratio, advantage = log_ratio(x).exp(), advantages(x)
        price = advantage.abs() * rollout_log_probs(x).exp() * (ratio - 1) ** 2 / (2 * self.delta)
        return Terms(label=-ratio * advantage + price)
