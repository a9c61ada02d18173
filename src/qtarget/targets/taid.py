"""Temporally adaptive interpolated distillation: a teacher that starts near the student."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.residuals import forward_kl, geometric_mixture
from qtarget.core.types import Needs, Outcomes, Target, Terms, TokenView


def next_interpolation(
    interpolation: float,
    momentum: float,
    loss: float,
    previous_loss: float,
    progress: float,
    *,
    start: float = 0.4,
    end: float = 1.0,
    step_size: float = 5e-4,
    decay: float = 0.99,
) -> tuple[float, float]:
    """The paper's adaptive schedule: move faster while the loss falls, never slower than linear.

    Args:
        interpolation, momentum: the state; begin with ``start`` and 0.
        loss, previous_loss: the objective now and one step ago.
        progress: share of training done, in [0, 1].
        start, end, step_size, decay: the paper's constants.

    Returns:
        The next interpolation and momentum.
    """
    relative_fall = (previous_loss - loss) / (previous_loss + 1e-15)
    momentum = decay * momentum + (1 - decay) * relative_fall
    sigmoid = (1 + math.tanh(momentum / 2)) / 2  # exp(-momentum) overflows after a loss of about 0
    step = step_size * sigmoid * (1 - interpolation)
    linear = start + (end - start) * progress
    return min(end, max(linear, interpolation + step)), momentum


@dataclass(frozen=True)
class TAID(Target):
    """``L = KL(r || p)``, ``r = softmax((1 - t) sg z + t z_T)``; ``a = 0``, ``b = 1``, ``q = r``.

    Args:
        interpolation: ``t`` in [0, 1]; the paper starts at 0.4 and ends at 1, moved by ``next_interpolation``.

    Example:
        >>> import torch, qtarget
        >>> target = qtarget.get_target("taid")
        >>> z = torch.zeros(1, 4)
        >>> qtarget.target_loss(z, torch.tensor([0]), target, teacher_logits=z)
        tensor(0.)

    Reference: arXiv 2501.16937. Deviations: ``t`` is fixed within a target; the schedule is a function of its own.
    """

    interpolation: float = 0.4

    name = "taid"
    formula = "KL(softmax((1-t) z + t z_T) || p)"
    paper = "2501.16937"
    has_label_term = False
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "interpolation", 0, 1)

    @property
    def needs(self) -> Needs:
        return Needs(teacher=frozenset({"distribution"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_teacher is not None
        mixture = geometric_mixture(x.on_teacher, self.interpolation)
        return Terms(residual=forward_kl(Outcomes(x.on_teacher.model, mixture)))
