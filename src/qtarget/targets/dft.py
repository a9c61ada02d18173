"""Dynamic fine-tuning: weight each token by the model's own probability of it."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, TokenView


@dataclass(frozen=True)
class DFT(LabelWeight):
    """``L = -sg(p_y) log p_y``; ``a = p_y``, ``b = 0``.

    Example:
        >>> import torch, qtarget
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), qtarget.get_target("dft"))  # log(4) / 4
        tensor(0.3466)

    Reference: arXiv 2508.05629 (the token-level loss). Deviations: none.
    """

    name = "dft"
    formula = "-sg(p_y) log p_y"
    paper = "2508.05629"

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        return x.label_probs
