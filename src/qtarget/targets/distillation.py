"""Knowledge distillation: the teacher's distribution instead of the observed token."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import cross_entropy
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class Distillation(Target):
    """``L = T^2 CE(softmax(z_T / T), softmax(z / T))``; ``a = 0``, ``b = 1``, ``q`` the teacher (at ``T = 1``).

    The value is the cross entropy, not the KL; value and gradient are both scaled by ``T^2``.

    Args:
        temperature: ``T > 0``; other than 1 it needs the teacher's full distribution, since a tail cannot be tempered.

    Example:
        >>> import torch, qtarget
        >>> target = qtarget.get_target("distillation")
        >>> qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), target, teacher_logits=torch.zeros(1, 4))  # log 4
        tensor(1.3863)

    Reference: arXiv 1503.02531. Deviations: none.
    """

    temperature: float = 1.0

    name = "distillation"
    formula = "T^2 CE(p_T^(1/T), p^(1/T))"
    paper = "1503.02531"
    has_label_term = False
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "temperature", 0, open_low=True)

    @property
    def needs(self) -> Needs:
        field = "distribution" if self.temperature == 1 else "log_probs"
        return Needs(teacher=frozenset({field}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        if self.temperature == 1:
            return Terms(residual=cross_entropy(x.on_teacher.frozen, x.on_teacher.model))
        teacher = (x.on_teacher.frozen / self.temperature).log_softmax(-1)
        model = (x.on_teacher.model / self.temperature).log_softmax(-1)
        return Terms(residual=self.temperature**2 * cross_entropy(teacher, model))
