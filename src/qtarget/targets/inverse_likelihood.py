"""Weight by the inverse of the base's likelihood, normalised over the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView, require


@dataclass(frozen=True)
class InverseLikelihood(LabelWeight):
    """``w = min(p_ref(y)^-k, clip)``, divided by its mean over the batch's trained tokens; ``a = w``, ``b = 0``.

    Args:
        power: ``k >= 0``; 0 is sft. Default 1 is ours.
        clip: largest weight before normalisation, at least 1. Default 10 is ours.

    Example:
        >>> import torch, qtarget
        >>> reference = qtarget.Reference(label_log_probs=torch.tensor([[1.0, 0.5]]).log())
        >>> target = qtarget.get_target("inverse_likelihood")
        >>> weights = qtarget.label_weights(target, torch.zeros(1, 2), reference=reference)
        >>> weights  # 1 and 2, over their mean 1.5
        tensor([[0.6667, 1.3333]])

    Reference: inverse-propensity weighting by a frozen prior. Deviations: none known; constants are ours.
    """

    power: float = 1.0
    clip: float = 10.0

    name = "inverse_likelihood"
    formula = "-w log p_y, w ~ min(p_ref(y)^-k, clip), mean 1"
    paper = "inverse propensity"
    scope = "batch"

    def __post_init__(self) -> None:
        in_range(self, "power", 0)
        in_range(self, "clip", 1)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs"}))

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        log_probs = require(x.reference, "label_log_probs", self.name)
        weights = -weighted(self.power, log_probs)
        weights = weights.clamp(max=math.log(self.clip)).exp()
        return weights / weights.mean()
