"""KL(teacher || model): mass-covering."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.residuals import forward_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class ForwardKL(Target):
    """``L = sum p_T log(p_T / p)``; ``a = 0``, ``b = 1``: distillation's gradient, and 0 at agreement.

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("forward_kl"), teacher_logits=z)
        tensor(0.)

    Reference: standard. Deviations: none.
    """

    name = "forward_kl"
    formula = "KL(p_T || p)"
    paper = "standard"
    has_label_term = False
    has_residual = True
    linear_in_frozen = True

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        return Terms(residual=forward_kl(x.on_teacher))
