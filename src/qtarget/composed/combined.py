"""A weight from one method on the label term of another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtarget.core.coefficients import differentiate
from qtarget.core.errors import IncompatibleError
from qtarget.core.products import weighted
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class Combined(Target):
    """``a <- w a``: the weight of one target on the label term of another; ``b`` and ``q`` stay.

    So ``dft+sft_kl`` is asft, and ``prior_surprise+label_smoothing`` trusts the label by ``(1 - p_ref)(1 - l)`` and
    spreads ``l`` whatever the weight is.

    Args:
        weight: a target without residual (dft, prior_surprise, eaft, rho1, ...).
        base: a target with a label term (sft, label_smoothing, sft_kl, hybrid_distillation, target_sft, ...).

    Raises:
        IncompatibleError: the parts have no meaning together.

    Example:
        >>> import torch, qtarget
        >>> both = qtarget.Combined(qtarget.get_target("dft"), qtarget.get_target("label_smoothing", smoothing=0.5))
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), both)  # (1/2 * 1/2 + 1/2) log 2
        tensor(0.5199)

    Reference: ours; ``a`` and ``b`` as in arXiv 2606.11189. Deviations: none.
    """

    weight: Target
    base: Target

    def __post_init__(self) -> None:
        for part in (self.weight, self.base):
            if part.needs.advantages:
                raise IncompatibleError(
                    f"{part.name!r} is a rule for samples and their advantages, not a weight on demonstrations; beside it a target "
                    "goes in qtarget.Regularised(region, target, weight)"
                )
        if self.weight.has_residual or not self.weight.has_label_term:
            raise IncompatibleError(
                f"{self.weight.name!r} pulls towards a residual distribution, so it cannot be a weight on {self.base.name!r}; "
                "put a pure label weight first (dft, prior_surprise, eaft, rho1, ...)"
            )
        if not self.base.has_label_term:
            raise IncompatibleError(
                f"{self.base.name!r} never looks at the observed token, so a weight on it has no meaning; "
                "combine with hybrid_distillation, sft_kl or target_sft instead"
            )
        if self.weight.scope != "token" and self.base.scope != "token":
            raise IncompatibleError(
                f"{self.name!r}: only one part may look at the whole batch; choose a token-scope part"
            )
        if self.base.scope != "token":
            raise IncompatibleError(
                f"{self.name!r}: put the {self.base.scope}-scope weight first: {self.base.name}+{self.weight.name}"
            )

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"{self.weight.name}+{self.base.name}"

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"w({self.weight.name}) x label term of {self.base.name}, residual unchanged"

    paper = "combination"

    @property
    def scope(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.weight.scope

    @property
    def has_residual(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.has_residual

    @property
    def linear_in_frozen(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.linear_in_frozen

    @property
    def live_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.base.live_weights

    @property
    def needs(self) -> Needs:
        return self.weight.needs | self.base.needs

    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        """The weight part's ``a``, detached."""
        return differentiate(self.weight, x).pulls(None)[0]

    def losses(self, x: TokenView) -> Terms:
        weights = self.label_weights(x) if x.label_weights is None else x.label_weights
        # they are the weight's, and a base that re-weights labels too would take them for its own
        terms = self.base.losses(replace(x, label_weights=None))
        assert terms.label is not None, "checked at construction: the base has a label term"
        return Terms(label=weighted(weights.detach(), terms.label), residual=terms.residual)
