"""A trust region on samples, and beside it a pull towards another model's distribution."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.checks import in_range
from qtarget.core.errors import IncompatibleError
from qtarget.core.products import weighted
from qtarget.core.regions import TrustRegion
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class Regularised(Target):
    """``L = L_region + weight L_target``: reinforcement learning with a teacher or an anchor over the whole vocabulary.

    The region's pull on the sampled token is the label term, the target's pull the residual term.

    Args:
        region: a trust region.
        target: a divergence or distillation, which never looks at the sampled token.
        weight: above 0.

    Raises:
        IncompatibleError: the parts are not of these kinds.

    Example:
        >>> import torch, qtarget
        >>> both = qtarget.Regularised(qtarget.get_target("dppo_tv"), qtarget.get_target("reverse_kl"), 0.5)
        >>> both.name
        'dppo_tv & 0.5 reverse_kl'
        >>> z, teacher = torch.zeros(1, 2), torch.tensor([[0.9, 0.1]]).log()
        >>> gained = torch.tensor([1.0])  # log 2 + 0.5 x 0.5108
        >>> qtarget.target_loss(z, torch.tensor([0]), both, advantages=gained, teacher_logits=teacher)
        tensor(0.9486)

    Reference: ours. Deviations: none.
    """

    region: Target
    target: Target
    weight: float = 1.0

    paper = "ours"
    has_residual = True

    def __post_init__(self) -> None:
        in_range(self, "weight", 0, open_low=True)
        if not isinstance(self.region, TrustRegion):
            raise IncompatibleError(
                f"{self.region.name!r} is no trust region; expected one (dppo_tv, ppo_clip, drpo, ...) and then a target"
            )
        if self.target.has_label_term or not self.target.has_residual:
            raise IncompatibleError(
                f"{self.target.name!r} pulls towards the sampled token whatever its advantage is; beside a trust region choose a "
                "target without a label term (reverse_kl, forward_kl, generalized_jsd, skew_kl, distillation)"
            )

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.region.name} & {self.weight} {self.target.name}"

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.region.formula} + {self.weight} {self.target.formula}"

    @property
    def linear_in_frozen(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.linear_in_frozen

    @property
    def needs(self) -> Needs:
        return self.region.needs | self.target.needs

    def losses(self, x: TokenView) -> Terms:
        residual = self.target.losses(x).residual
        assert residual is not None, "checked at construction"
        return Terms(label=self.region.losses(x).label, residual=weighted(self.weight, residual))
