"""Between SFT and DFT: the power family of "Beyond log-likelihood"."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.types import Target, Terms, TokenView


@dataclass(frozen=True)
class PPower(Target):
    """``L = (1 - p_y^alpha) / alpha``; ``a = p_y^alpha``, ``b = 0``. At ``alpha -> 0`` it is sft, at 1 it has dft's gradient.

    Args:
        alpha: exponent, at least 0 (0 is the limit ``-log p_y``). Default 0.5 is ours.

    Example:
        >>> import torch, qtarget
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), qtarget.get_target("p_power", alpha=0.5))  # 2 (1 - 1/2)
        tensor(1.)

    Reference: arXiv 2510.00526. Deviations: none.
    """

    alpha: float = 0.5

    name = "p_power"
    formula = "(1 - p_y^alpha) / alpha"
    paper = "2510.00526"
    live_weights = True

    def __post_init__(self) -> None:
        in_range(self, "alpha", 0)

    def losses(self, x: TokenView) -> Terms:
        if self.alpha == 0:
            return Terms(label=-x.label_log_probs)
        return Terms(label=-torch.expm1(self.alpha * x.label_log_probs) / self.alpha)
