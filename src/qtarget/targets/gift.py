"""The label as a bonus on the frozen base's logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import cross_entropy, uniform_cross_entropy
from qtarget.core.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class GIFT(Target):
    """``L = CE(Q, p)``, ``Q = softmax(log((1 - s) p_ref + s / V) + beta d_y)``.

    With ``w = (1 - s) p_ref + s / V`` and ``Z = 1 + w_y (e^beta - 1)``: ``Q = (w + (e^beta - 1) w_y d_y) / Z``, so
    ``a = w_y (e^beta - 1) / Z`` and the residual is ``w`` with weight ``1 / Z``.

    Args:
        beta: bonus on the label's logit, nats, at least 0; 20 is the paper's.
        smoothing: ``s`` in [0, 1], the uniform share that lets unlikely labels through. Default 0.01 is ours.

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> reference = qtarget.Reference.from_logits(z, torch.tensor([0]))
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("gift"), reference=reference)  # p uniform: log 4
        tensor(1.3863)

    Reference: arXiv 2601.09233. Deviations: none.
    """

    beta: float = 20.0
    smoothing: float = 0.01

    name = "gift"
    formula = "CE(softmax(log((1-s) p_ref + s/V) + beta d_y), p)"
    paper = "2601.09233"
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "beta", 0, 80)
        in_range(self, "smoothing", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(mean_log_prob=True, reference=frozenset({"label_log_probs", "distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None and x.mean_log_prob is not None
        p_ref = require(x.reference, "label_log_probs", self.name).exp()
        w_y = (1 - self.smoothing) * p_ref + self.smoothing / x.vocab_size
        bonus = math.expm1(self.beta) * w_y
        anchor = weighted(1 - self.smoothing, cross_entropy(x.on_reference.frozen, x.on_reference.model))
        uniform = weighted(self.smoothing, uniform_cross_entropy(x.mean_log_prob))
        label = -weighted(bonus / (1 + bonus), x.label_log_probs)
        return Terms(label=label, residual=(anchor + uniform) / (1 + bonus))
