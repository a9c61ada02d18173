"""Label smoothing: part of the mass goes to the uniform distribution."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import uniform_cross_entropy
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class LabelSmoothing(Target):
    """``L = -(1 - l) log p_y - l / V sum_v log p_v``; ``a = 1 - l``, ``b = l``, ``q`` uniform.

    Args:
        smoothing: ``l`` in [0, 1]; 0.1 is the paper's.

    Example:
        >>> import torch, qtarget
        >>> target = qtarget.get_target("label_smoothing", smoothing=0.1)
        >>> logits, labels = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([0])
        >>> ours = qtarget.target_loss(logits, labels, target)
        >>> torch.allclose(ours, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
        True

    Reference: arXiv 1512.00567, section 7. Deviations: none.
    """

    smoothing: float = 0.1

    name = "label_smoothing"
    formula = "(1-l) CE(d_y, p) + l CE(uniform, p)"
    paper = "1512.00567"
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "smoothing", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(mean_log_prob=True)

    def losses(self, x: TokenView) -> Terms:
        assert x.mean_log_prob is not None
        return Terms(
            label=-weighted(1 - self.smoothing, x.label_log_probs),
            residual=weighted(self.smoothing, uniform_cross_entropy(x.mean_log_prob)),
        )
