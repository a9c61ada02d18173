"""SFT with a forward-KL anchor to the frozen base."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import forward_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class SFTKL(Target):
    """``L = -log p_y + lambda KL(p_ref || p)``; ``a = 1``, ``b = lambda``, ``q = p_ref``, up to the scale ``1 + lambda``.

    The KL is over the whole vocabulary (or top-k with tail), not the sampled estimator of RL code.

    Args:
        kl_weight: ``lambda >= 0``. Default 0.1 is ours.

    Example:
        >>> import torch, qtarget
        >>> logits = torch.zeros(1, 4)
        >>> reference = qtarget.Reference(log_probs=logits.log_softmax(-1))
        >>> qtarget.target_loss(logits, torch.tensor([0]), qtarget.get_target("sft_kl"), reference=reference)  # KL is 0
        tensor(1.3863)

    Reference: standard; in the lens of arXiv 2606.11189. Deviations: none.
    """

    kl_weight: float = 0.1

    name = "sft_kl"
    formula = "-log p_y + lambda KL(p_ref || p)"
    paper = "standard"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "kl_weight", 0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None
        return Terms(label=-x.label_log_probs, residual=weighted(self.kl_weight, forward_kl(x.on_reference)))
