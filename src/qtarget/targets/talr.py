"""Token-adaptive loss re-weighting: hard tokens count less, by the batch's own scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.reductions import sequence_means
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, TokenView


@dataclass(frozen=True)
class TALR(LabelWeight):
    """``w = max(exp(-nll / tau), w_min)``, ``tau`` the median over the batch's sequences of their mean nll; ``a = w``.

    Args:
        min_weight: ``w_min`` in [0, 1]; 0.01 (from memory of the paper: unconfirmed).

    Example:
        >>> import torch, qtarget
        >>> weights = qtarget.label_weights(qtarget.get_target("talr"), torch.tensor([[-1.0, -3.0]]))
        >>> weights  # tau = 2: exp(-1/2), exp(-3/2)
        tensor([[0.6065, 0.2231]])

    Reference: arXiv 2509.20758. Deviations: with an even number of sequences the lower median is taken.
    """

    min_weight: float = 0.01

    name = "talr"
    formula = "-max(exp(-nll/tau), w_min) log p_y, tau = median sequence nll"
    paper = "2509.20758"
    scope = "batch"

    def __post_init__(self) -> None:
        in_range(self, "min_weight", 0, 1)

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        assert x.sequence_ids is not None
        nll = -x.label_log_probs.detach()
        if not nll.numel():
            return nll
        means, _ = sequence_means(nll, x.sequence_ids)
        tau = means.median().clamp(min=torch.finfo(nll.dtype).tiny)  # a batch learnt by heart: 0 / 0
        # a label of probability 0 takes the limit 0, also where it makes the median infinite
        return (-nll / tau).exp().masked_fill(nll == torch.inf, 0.0).clamp(min=self.min_weight)
