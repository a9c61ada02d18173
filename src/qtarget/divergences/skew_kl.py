"""Skewed forward KL: the teacher against a blend of teacher and model."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import expectation, log_mixture
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class SkewKL(Target):
    """``L = KL(p_T || alpha p_T + (1 - alpha) p)``; gradient ``p sum(u) - u`` weighted by p: ``g = -(u - p sum u)``,
    ``u = (1 - alpha) p_T p / M``.

    Args:
        alpha: skew in [0, 1); 0.1 is the paper's. 0 is forward KL.

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("skew_kl"), teacher_logits=z)
        tensor(0.)

    Reference: arXiv 2402.03898 (DistiLLM). Deviations: none.
    """

    alpha: float = 0.1

    name = "skew_kl"
    formula = "KL(p_T || alpha p_T + (1-alpha) p)"
    paper = "2402.03898"
    has_label_term = False
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "alpha", 0, 0.999)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        teacher = x.on_teacher.frozen
        return Terms(residual=expectation(teacher, teacher - log_mixture(x.on_teacher, self.alpha)))
