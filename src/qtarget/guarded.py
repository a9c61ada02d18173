"""A guard against a flawed prior: where the demonstrations agree against the frozen base, the label has its weight back."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.errors import IncompatibleError
from qtarget.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class Guarded(Target):
    """``L = (1 - c) L_target - c log p_y``; ``a <- (1 - c) a + c``, ``b <- (1 - c) b``.

    ``c`` in [0, 1) is the conflict of the data with the frozen base (`qtarget.data.agreement.prior_conflict`): near 1 where
    other rows say the same and the base expects none of them, 0 where it knew, and 0 for a token that only one row has.

    Args:
        target: any target of token scope with a label term; most useful where the weight or the residual follows a prior.

    Raises:
        IncompatibleError: the target looks at more than one token, or never at the observed one.

    Example:
        >>> import torch, qtarget
        >>> known = qtarget.Reference(conflict=torch.tensor([0.5]))
        >>> guarded = qtarget.Guarded(qtarget.get_target("dft"))
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), guarded, reference=known)  # (1/2 * 1/2 + 1/2) log 2
        tensor(0.5199)

    Reference: ours. Deviations: none.
    """

    target: Target

    paper = "ours"

    def __post_init__(self) -> None:
        if self.target.scope != "token":
            raise IncompatibleError(
                f"{self.target.name!r} weighs a whole {self.target.scope} at once, and the guard weighs tokens; choose a "
                "target of token scope, or train without guard"
            )
        if not self.target.has_label_term:
            raise IncompatibleError(
                f"{self.target.name!r} never looks at the observed token, so there is no label weight to give back; "
                "train it without guard"
            )

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"guarded {self.target.name}"

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return f"(1 - c) x {self.target.name} - c log p_y"

    @property
    def has_residual(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.has_residual

    @property
    def linear_in_frozen(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.linear_in_frozen

    @property
    def prior(self) -> str:
        """The role whose numbers hold the conflict: that of the frozen model which the target follows."""
        return "teacher" if self.target.needs.teacher else "reference"

    @property
    def needs(self) -> Needs:
        conflict = frozenset({"conflict"})
        own = Needs(teacher=conflict) if self.prior == "teacher" else Needs(reference=conflict)
        return self.target.needs | own

    def losses(self, x: TokenView) -> Terms:
        conflict = require(getattr(x, self.prior), "conflict", self.name, self.prior)
        terms = self.target.losses(x)
        assert terms.label is not None, "checked at construction"
        residual = None if terms.residual is None else (1 - conflict) * terms.residual
        return Terms(label=(1 - conflict) * terms.label - conflict * x.label_log_probs, residual=residual)
