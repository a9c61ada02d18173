"""Simple policy optimisation: a quadratic price on the ratio instead of a clip."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.regions import TrustRegion, advantages, log_ratio
from qtarget.core.types import Terms, TokenView


@dataclass(frozen=True)
class SPO(TrustRegion):
    """``L = -r A + |A| (r - 1)^2 / (2 eps)``; ``a = w r A``, ``w = 1 - sign(A (r - 1)) |r - 1| / eps``.

    A token that left the region outwards is pulled back (``w < 0``), one that comes back is helped (``w > 1``).

    Args:
        eps: above 0, infinity for no region; 0.2 is the paper's.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.4]).log())
        >>> rule = qtarget.get_target("spo")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(-1.0938)

    Reference: arXiv 2401.16025. Deviations: ``|log r|`` is at most 20.
    """

    eps: float = 0.2

    name = "spo"
    formula = "-r A + |A| (r - 1)^2 / (2 eps)"
    paper = "2401.16025"

    def __post_init__(self) -> None:
        in_range(self, "eps", 0, open_low=True, infinite=True)

    def losses(self, x: TokenView) -> Terms:
        ratio, advantage = log_ratio(x).exp(), advantages(x)
        price = advantage.abs() * (ratio - 1) ** 2 / (2 * self.eps)
        return Terms(label=-ratio * advantage + price)
