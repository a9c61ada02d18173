"""Train only on tokens that the model already finds likely enough."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, TokenView


@dataclass(frozen=True)
class ProFit(LabelWeight):
    """``L = -1[p_y > tau] log p_y``; ``a = 1[p_y > tau]``, ``b = 0``.

    Args:
        threshold: ``tau`` in [0, 1]; 0.1 is the paper's.

    Example:
        >>> import torch, qtarget
        >>> logits = torch.tensor([[0.95, 0.05], [0.05, 0.95]]).log()
        >>> _, losses = qtarget.target_loss(logits, torch.tensor([0, 0]), qtarget.get_target("profit"), return_token_losses=True)
        >>> losses
        tensor([0.0513, 0.0000])

    Reference: arXiv 2601.09195. Deviations: none.
    """

    threshold: float = 0.1

    name = "profit"
    formula = "-1[p_y > tau] log p_y"
    paper = "2601.09195"

    def __post_init__(self) -> None:
        in_range(self, "threshold", 0, 1)

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        return (x.label_probs > self.threshold).to(x.label_log_probs.dtype)
