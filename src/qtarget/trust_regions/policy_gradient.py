"""Policy gradient with importance weights: no region at all."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.regions import TrustRegion, advantages, log_ratio
from qtarget.core.types import Terms, TokenView


@dataclass(frozen=True)
class PolicyGradient(TrustRegion):
    """``L = -r A``; ``a = r A``. The row to compare every region with: each becomes it as its threshold grows.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.4]).log())
        >>> rule = qtarget.get_target("policy_gradient")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(-1.2500)

    Reference: REINFORCE (Williams, 1992) with the importance weight of each token. Deviations: ``|log r|`` is at most 20.
    """

    name = "policy_gradient"
    formula = "-r A"
    paper = "Williams 1992"

    def losses(self, x: TokenView) -> Terms:
        return Terms(label=-log_ratio(x).exp() * advantages(x))
