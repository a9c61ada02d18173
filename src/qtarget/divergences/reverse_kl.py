"""KL(model || teacher): mode-seeking."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.residuals import refuse_renormalize, reverse_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class ReverseKL(Target):
    """``L = sum p log(p / p_T)``, gradient ``p_k (log(p_k / p_T,k) - L)``.

    Infinite where the model keeps mass that the teacher excludes; so a ``renormalize`` tail is refused.

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("reverse_kl"), teacher_logits=z)
        tensor(0.)

    Reference: standard (MiniLLM, arXiv 2306.08543, uses it on sequences). Deviations: none.
    """

    name = "reverse_kl"
    formula = "KL(p || p_T)"
    paper = "2306.08543"
    has_label_term = False
    has_residual = True

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        refuse_renormalize(x.teacher, self.name)
        return Terms(residual=reverse_kl(x.on_teacher))
