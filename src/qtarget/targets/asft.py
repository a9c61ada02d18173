"""Anchored SFT: DFT's weight, and a forward-KL anchor to the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import forward_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class ASFT(Target):
    """``L = -sg(p_y) log p_y + lambda KL(p_ref || p)``; ``a = p_y``, ``b = lambda``, ``q = p_ref``.

    The table of the lens holds it up to the scale ``p_y + lambda``.

    Args:
        kl_weight: ``lambda >= 0``; 0.05 is the paper's (the authors' code uses 0.1).

    Example:
        >>> import torch, qtarget
        >>> logits = torch.zeros(1, 4)
        >>> reference = qtarget.Reference(log_probs=logits.log_softmax(-1))
        >>> qtarget.target_loss(logits, torch.tensor([0]), qtarget.get_target("asft"), reference=reference)  # log(4) / 4
        tensor(0.3466)

    Reference: arXiv 2509.23753. Deviations: none.
    """

    kl_weight: float = 0.05

    name = "asft"
    formula = "-sg(p_y) log p_y + lambda KL(p_ref || p)"
    paper = "2509.23753"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "kl_weight", 0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None
        return Terms(
            label=-weighted(x.label_probs, x.label_log_probs),
            residual=weighted(self.kl_weight, forward_kl(x.on_reference)),
        )
