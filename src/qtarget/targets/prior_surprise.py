"""Weight by the frozen base model's surprise: the newsletter's rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView, require


@dataclass(frozen=True)
class PriorSurprise(LabelWeight):
    """``L = -(1 - p_ref(y)) log p_y``; ``a = 1 - p_ref(y)``, ``b = 0``.

    It raises the weight of everything the base finds unlikely, noise included: on demonstrations with random wrong
    tokens it does worse than plain SFT (see the README's table).

    Example:
        >>> import torch, qtarget
        >>> reference = qtarget.Reference(label_log_probs=torch.tensor([0.75]).log())
        >>> target = qtarget.get_target("prior_surprise")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), target, reference=reference)  # log(2) / 4
        tensor(0.1733)

    Reference: a newsletter's reading of arXiv 2606.11189. Deviations: none.
    """

    name = "prior_surprise"
    formula = "-(1 - p_ref(y)) log p_y"
    paper = "newsletter"

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs"}))

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        return -torch.expm1(require(x.reference, "label_log_probs", self.name))
