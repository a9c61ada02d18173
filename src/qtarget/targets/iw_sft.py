"""Importance-weighted SFT: sequences that the model has come to favour count more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.reductions import sequence_means
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import LabelWeight, Needs, TokenView, require


@dataclass(frozen=True)
class IWSFT(LabelWeight):
    """``w = min(exp(T mean_t(log p_y - log p_ref,y)), w_max)`` for each sequence; ``a = w``, ``b = 0``.

    Args:
        temperature: ``T``, above 0; 1 by default.
        max_weight: upper clamp, above 0; 16 by default (the authors' code).

    Example:
        >>> import torch, qtarget
        >>> reference = qtarget.Reference(label_log_probs=torch.tensor([[-2.0, -2.0]]))
        >>> target = qtarget.get_target("iw_sft")
        >>> qtarget.label_weights(target, torch.tensor([[-1.0, -1.0]]), reference=reference)  # e^1
        tensor([[2.7183, 2.7183]])

    Reference: arXiv 2507.12856. Deviations: the sequence form; the authors' per-token form (clamped to [0.2, 1.8]) is
    another weight and not offered under this name.
    """

    temperature: float = 1.0
    max_weight: float = 16.0

    name = "iw_sft"
    formula = "-w_seq log p_y, w_seq = min(exp(T mean log p/p_ref), w_max)"
    paper = "2507.12856"
    scope = "sequence"

    def __post_init__(self) -> None:
        in_range(self, "temperature", 0, open_low=True)
        in_range(self, "max_weight", 0, open_low=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs"}))

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        assert x.sequence_ids is not None
        live = x.label_log_probs.detach()
        means, index = sequence_means(live - require(x.reference, "label_log_probs", self.name), x.sequence_ids)
        weights = (self.temperature * means).exp().clamp(max=self.max_weight)
        # a sequence that the model excludes weighs 0, whatever the reference says of it
        gone = sequence_means(live, x.sequence_ids)[0] == -torch.inf
        return weights.masked_fill(gone, 0.0)[index]
