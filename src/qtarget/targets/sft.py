"""Supervised fine-tuning: the observed token, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.types import Target, Terms, TokenView


@dataclass(frozen=True)
class SFT(Target):
    """``L = -log p_y``; ``a = 1``, ``b = 0``.

    Example:
        >>> import torch, qtarget
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), qtarget.get_target("sft"))  # log 4
        tensor(1.3863)

    Reference: cross entropy. Deviations: none.
    """

    name = "sft"
    formula = "-log p_y"
    paper = "cross entropy"

    def losses(self, x: TokenView) -> Terms:
        return Terms(label=-x.label_log_probs)
