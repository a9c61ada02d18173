"""Weight by the model's own uncertainty: confident tokens, right or wrong, are left alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import expectation
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView


@dataclass(frozen=True)
class EAFT(LabelWeight):
    """``w = (H_k / ln k)^alpha`` with ``H_k`` the entropy of the renormalised top k; ``a = w``, ``b = 0``.

    Args:
        alpha: exponent, at least 0; 1 is the paper's.
        top_k: ``k``, at least 2; 20 is the paper's. The vocabulary must be at least as large.

    Example:
        >>> import torch, qtarget
        >>> target = qtarget.get_target("eaft", top_k=4)
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), target)  # weight 1: log 4
        tensor(1.3863)

    Reference: arXiv 2601.02151. Deviations: divides by ln k, so weights end at 1; the authors' code divides by 3.0
    (ln 20 = 2.996).
    """

    alpha: float = 1.0
    top_k: int = 20

    name = "eaft"
    formula = "-(H_k/ln k)^alpha log p_y"
    paper = "2601.02151"

    def __post_init__(self) -> None:
        in_range(self, "alpha", 0)
        in_range(self, "top_k", 2)

    @property
    def needs(self) -> Needs:
        return Needs(top_k=self.top_k)

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        assert x.top_log_probs is not None
        log_probs = x.top_log_probs.log_softmax(-1)
        entropy = -expectation(log_probs, log_probs)
        return (entropy / math.log(self.top_k)) ** self.alpha  # no log-softmax is above 0, so no root is of less
