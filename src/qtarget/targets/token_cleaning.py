"""Keep the tokens on which the model's loss most exceeds the frozen model's; drop the rest as noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.reductions import keep_top
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView, require


@dataclass(frozen=True)
class TokenCleaning(LabelWeight):
    """``w = 1`` for the top share of ``nll - nll_ref`` over the batch's trained tokens, else 0; ``a = w``, ``b = 0``.

    The reference is a model tuned on a trusted part of the data. The denominator stays the count of all trained tokens.

    Args:
        keep_fraction: share of tokens kept, in (0, 1]; 0.6 (the paper uses 60 to 70 %).

    Example:
        >>> import torch, qtarget
        >>> reference = qtarget.Reference(label_log_probs=torch.tensor([[-1.0, -1.0]]))
        >>> target = qtarget.get_target("token_cleaning", keep_fraction=0.5)
        >>> qtarget.label_weights(target, torch.tensor([[-1.5, -3.0]]), reference=reference)
        tensor([[0., 1.]])

    Reference: arXiv 2502.01968. Deviations: the fixed-model form; the self-evolving loop is a schedule around it.
    """

    keep_fraction: float = 0.6

    name = "token_cleaning"
    formula = "-1[top k of nll - nll_ref] log p_y"
    paper = "2502.01968"
    scope = "batch"

    def __post_init__(self) -> None:
        in_range(self, "keep_fraction", 0, 1, open_low=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs"}))

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        known = require(x.reference, "label_log_probs", self.name)
        # what the reference excludes has nothing to teach, whatever the model says of it
        excess = (known - x.label_log_probs.detach()).masked_fill(known == -torch.inf, -torch.inf)
        return keep_top(excess, self.keep_fraction)
