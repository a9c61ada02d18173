"""The observed token and the teacher, in fixed parts."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import cross_entropy
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class HybridDistillation(Target):
    """``L = -(1 - l) log p_y + l CE(p_T, p)``; ``a = 1 - l``, ``b = l``, ``q`` the teacher.

    Args:
        teacher_weight: ``l`` in [0, 1]. Default 0.5 is ours.

    Example:
        >>> import torch, qtarget
        >>> target = qtarget.get_target("hybrid_distillation", teacher_weight=0.5)
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), target, teacher_logits=torch.zeros(1, 4))  # log 4
        tensor(1.3863)

    Reference: arXiv 1503.02531, section 2. Deviations: none.
    """

    teacher_weight: float = 0.5

    name = "hybrid_distillation"
    formula = "(1-l) CE(d_y, p) + l CE(p_T, p)"
    paper = "1503.02531"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "teacher_weight", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        return Terms(
            label=-weighted(1 - self.teacher_weight, x.label_log_probs),
            residual=weighted(self.teacher_weight, cross_entropy(x.on_teacher.frozen, x.on_teacher.model)),
        )
