"""Skewed reverse KL: the model against a blend of model and teacher."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import expectation, log_mixture, refuse_renormalize
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class SkewReverseKL(Target):
    """``L = KL(p || alpha p + (1 - alpha) p_T)``.

    Args:
        alpha: skew in [0, 1); 0.1 is the paper's. 0 is reverse KL (which refuses a ``renormalize`` tail).

    Example:
        >>> import torch, qtarget
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("skew_reverse_kl"), teacher_logits=z)
        tensor(0.)

    Reference: arXiv 2402.03898 (DistiLLM). Deviations: none.
    """

    alpha: float = 0.1

    name = "skew_reverse_kl"
    formula = "KL(p || alpha p + (1-alpha) p_T)"
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
        if self.alpha == 0:
            refuse_renormalize(x.teacher, self.name)
        model = x.on_teacher.model
        return Terms(residual=expectation(model, model - log_mixture(x.on_teacher, 1 - self.alpha)))
