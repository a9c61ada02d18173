"""CISPO: the importance weight is cut, the token never is."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.regions import TrustRegion, advantages, log_ratio, weighted_log_probs
from qtarget.core.types import Terms, TokenView


@dataclass(frozen=True)
class CISPO(TrustRegion):
    """``L = -sg(min(r, C)) A log pi``; ``a = min(r, C) A``. With another name: truncated importance sampling.

    Args:
        max_ratio: ``C``, at least 1; 3 is common.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.25]).log())
        >>> rule = qtarget.get_target("cispo")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(1.3863)

    Reference: arXiv 2506.13585 (eq. 4; the paper leaves its constant open). Deviations: ``|log r|`` is at most 20.
    """

    max_ratio: float = 3.0

    name = "cispo"
    formula = "-sg(min(r, C)) A log pi"
    paper = "2506.13585"

    def __post_init__(self) -> None:
        in_range(self, "max_ratio", 1, infinite=True)

    def losses(self, x: TokenView) -> Terms:
        weight = log_ratio(x).detach().exp().clamp(max=self.max_ratio) * advantages(x)
        return Terms(label=-weighted_log_probs(weight, x))
