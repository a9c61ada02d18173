"""A trust region whose advantage comes from a teacher: distillation on samples, one sampled token at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtarget.core.errors import IncompatibleError
from qtarget.core.regions import TrustRegion, advantages
from qtarget.core.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class Taught(TrustRegion):
    """The region's loss with ``A + sg(log p_T - log pi)`` in place of ``A``: rewards, and what a teacher gains on the policy.

    With ``A = 0`` it is distillation. On fresh samples, and on old ones weighed by ``r``, its gradient is that of
    ``KL(pi || p_T)`` in expectation; ``reverse_kl`` has the same without the noise of sampling, and needs the teacher's whole
    distribution.

    Args:
        region: a trust region.

    Raises:
        IncompatibleError: the part is not of this kind.

    Example:
        >>> import torch, qtarget
        >>> rule = qtarget.Taught(qtarget.get_target("policy_gradient"))
        >>> rule.name
        'policy_gradient by a teacher'
        >>> told = qtarget.Reference(label_log_probs=torch.tensor([0.25]).log())
        >>> z = torch.zeros(1, 2, requires_grad=True)  # the teacher thinks half as much of token 0
        >>> qtarget.target_loss(z, torch.tensor([0]), rule, advantages=torch.zeros(1), teacher=told).backward()
        >>> z.grad  # -log(1/2) x (1 - 1/2)
        tensor([[ 0.3466, -0.3466]])

    Reference: ours; with ``policy_gradient``, on-policy distillation of sampled tokens as in public trainers. Deviations: none.
    """

    region: Target

    paper = "ours"

    def __post_init__(self) -> None:
        if not isinstance(self.region, TrustRegion) or isinstance(self.region, Taught):
            raise IncompatibleError(
                f"{self.region.name!r} reads no advantage that a teacher could give; expected a trust region (dppo_tv, ppo_clip, "
                "drpo, ...)"
            )

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.region.name} by a teacher"

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.region.formula}, A + sg(log p_T - log pi) for A"

    @property
    def needs(self) -> Needs:
        return self.region.needs | Needs(teacher=frozenset({"label_log_probs"}))

    def losses(self, x: TokenView) -> Terms:
        told = require(x.teacher, "label_log_probs", self.name, "teacher")
        gained = told - x.label_log_probs.detach()
        return self.region.losses(replace(x, advantages=advantages(x) + gained))
