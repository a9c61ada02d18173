"""Entropic fine-tuning by game: push against the model's own sharpened distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range, one_of
from qtarget.core.residuals import expectation
from qtarget.core.types import Needs, Target, Terms, TokenView

SIGMOID_SLOPE = 0.01
"""Slope of the logsigmoid form, from the authors' script."""


@dataclass(frozen=True)
class GEM(Target):
    """``L = -sum_v q_v h_v (log p_y - log p_v)``, ``q = sg softmax(z / beta)``.

    ``linear``: ``h = 1``, gradient ``q - d_y``, so ``a = 1``, ``b = -1``; the induced target ``p + d_y - q`` may be negative.
    ``logsigmoid``: ``h = sg sigmoid(0.01 (z_v - z_y))``, gradient ``q h - (sum q h) d_y``.

    Args:
        temperature: ``beta > 0``; 0.7 is the authors'.
        form: ``linear`` (the paper's analysis) or ``logsigmoid`` (the authors' script).

    Example:
        >>> import torch, qtarget
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), qtarget.get_target("gem"))
        tensor(0.)

    Reference: arXiv 2408.16673. Deviations: none.
    """

    temperature: float = 0.7
    form: str = "linear"

    name = "gem"
    formula = "-sum q h (log p_y - log p_v), q = softmax(z/beta)"
    paper = "2408.16673"
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "temperature", 0, open_low=True)
        one_of(self, "form", ("linear", "logsigmoid"))

    @property
    def needs(self) -> Needs:
        return Needs(log_probs=True)

    def losses(self, x: TokenView) -> Terms:
        assert x.log_probs is not None
        log_probs = x.log_probs.detach()
        pull = (log_probs / self.temperature).softmax(-1)
        if self.form == "logsigmoid":
            gap = log_probs - x.label_log_probs.detach()[:, None]
            # two tokens of probability 0 have no gap, and one of them is pulled by nothing
            pull = pull * torch.sigmoid(SIGMOID_SLOPE * gap.masked_fill(pull == 0, 0.0))
        return Terms(label=-pull.sum(-1) * x.label_log_probs, residual=expectation(pull.log(), x.log_probs))
