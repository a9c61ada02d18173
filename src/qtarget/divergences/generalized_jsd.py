"""Generalised Jensen-Shannon divergence between teacher and model."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import expectation, forward_kl, log_mixture, refuse_renormalize, reverse_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class GeneralizedJSD(Target):
    """``M = (1 - beta) p + beta p_T``; ``L = beta KL(p_T || M) + (1 - beta) KL(p || M)``.

    ``beta = 0`` means forward KL, ``KL(teacher || model)``, and ``beta = 1`` reverse KL, ``KL(model || teacher)``: the
    limits of ``L / beta`` and ``L / (1 - beta)``. Projects disagree on this; here it is in words.

    Args:
        beta: in [0, 1]; 0.5 is the symmetric one.

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("generalized_jsd"), teacher_logits=z)
        tensor(0.)

    Reference: arXiv 2306.13649, equation 1. Deviations: none.
    """

    beta: float = 0.5

    name = "generalized_jsd"
    formula = "beta KL(p_T || M) + (1-beta) KL(p || M)"
    paper = "2306.13649"
    has_label_term = False
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "beta", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        model, teacher = x.on_teacher.model, x.on_teacher.frozen
        if self.beta == 0:
            return Terms(residual=forward_kl(x.on_teacher))
        if self.beta == 1:
            refuse_renormalize(x.teacher, self.name)
            return Terms(residual=reverse_kl(x.on_teacher))
        mixture = log_mixture(x.on_teacher, self.beta)
        to_teacher = expectation(teacher, teacher - mixture)
        to_model = expectation(model, model - mixture)
        return Terms(residual=self.beta * to_teacher + (1 - self.beta) * to_model)
