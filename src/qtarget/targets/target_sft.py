"""Target-SFT: trust the label as far as the model does, and send the rest to a mixture of self and teacher."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import cross_entropy, geometric_mixture
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class TargetSFT(Target):
    """``L = CE(Q, p)``, ``Q = p_y d_y + (1 - p_y) softmax((1 - eta) sg z + eta z_T)``, ``Q`` detached.

    ``a = p_y``, ``b = 1 - p_y``. At ``eta = 0`` the gradient is dft's; at 1 it is distillation mixed in by ``1 - p_y``.

    Args:
        eta: share of the teacher in the geometric mixture, in [0, 1]. The paper's value is not public; 0.3 is ours.

    Example:
        >>> import torch, qtarget
        >>> z = torch.tensor([[1.2, 0.3, -0.5, 2.0, -1.0, 0.1]], dtype=torch.float64)
        >>> z_teacher = torch.tensor([[0.2, 1.5, -0.7, 1.0, 0.4, -2.0]], dtype=torch.float64)
        >>> target = qtarget.get_target("target_sft", eta=0.3)
        >>> round(float(qtarget.target_loss(z, torch.tensor([1]), target, teacher_logits=z_teacher)), 7)
        1.5514188

    Reference: arXiv 2606.11189. Deviations: with a top-k teacher under the ``bucket`` policy the mixture is over k + 1
    outcomes.
    """

    eta: float = 0.3

    name = "target_sft"
    formula = "CE(p_y d_y + (1-p_y) softmax((1-eta) z + eta z_T), p)"
    paper = "2606.11189"
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "eta", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        p_y = x.label_probs
        mixture = geometric_mixture(x.on_teacher, self.eta)
        return Terms(
            label=-weighted(p_y, x.label_log_probs),
            residual=weighted(1 - p_y, cross_entropy(mixture, x.on_teacher.model)),
        )
