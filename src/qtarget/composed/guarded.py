"""A guard against a flawed prior: where the demonstrations agree against the frozen base, the label has its weight back."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.errors import IncompatibleError
from qtarget.core.products import weighted
from qtarget.core.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class Guarded(Target):
    """``L = (1 - t) L_label - t log p_y + (1 - d) L_residual``, so ``a <- a + t (1 - a)`` and ``b <- (1 - d) b``.

    ``d`` in [0, 1] is the conflict of the data with the frozen base (`qtarget.data.agreement.prior_conflict`): 1 where nearly
    all rows surprise it in this place, 0 where it knew. ``A`` is the other rows' ``agreement`` with the label, so that a
    token which no other row supports gets nothing back however wrong the base is around it: ``t = d A / (A + 0.02)``.

    Args:
        target: any target of token scope with a label term; most useful where the weight or the residual follows a prior.

    Raises:
        IncompatibleError: the target looks at more than one token, or never at the observed one.

    Example:
        >>> import torch, qtarget
        >>> known = qtarget.Reference(conflict=torch.tensor([0.5]), agreement=torch.tensor([0.18]))
        >>> guarded = qtarget.Guarded(qtarget.get_target("dft"))
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), guarded, reference=known)  # (0.55/2 + 0.45) log 2
        tensor(0.5025)

    Reference: ours. Deviations: none.
    """

    target: Target

    paper = "ours"

    def __post_init__(self) -> None:
        if self.target.needs.advantages:
            raise IncompatibleError(
                f"{self.target.name!r} weighs samples by their advantages, and the guard weighs demonstrations by what other rows "
                "say; train it without guard"
            )
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
        return f"{self.target.name}, label part x (1 - t) - t log p_y, residual x (1 - d), t = d A / (A + {SUPPORT})"

    @property
    def has_residual(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.has_residual

    @property
    def linear_in_frozen(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.linear_in_frozen

    @property
    def live_weights(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.target.live_weights

    @property
    def prior(self) -> str:
        """The role whose numbers hold the conflict: that of the frozen model which the target follows."""
        return "teacher" if self.target.needs.teacher else "reference"

    @property
    def needs(self) -> Needs:
        fields = frozenset({"agreement", "conflict"})
        own = Needs(teacher=fields) if self.prior == "teacher" else Needs(reference=fields)
        return self.target.needs | own

    def losses(self, x: TokenView) -> Terms:
        known = getattr(x, self.prior)
        conflict = require(known, "conflict", self.name, self.prior)
        agreed = require(known, "agreement", self.name, self.prior)
        trust = conflict * agreed / (agreed + SUPPORT)
        terms = self.target.losses(x)
        assert terms.label is not None, "checked at construction"
        residual = None if terms.residual is None else weighted(1 - conflict, terms.residual)
        label = weighted(1 - trust, terms.label) - weighted(trust, x.label_log_probs)
        return Terms(label=label, residual=residual)


SUPPORT = 0.02
"""Agreement at which a label has half of its weight back: a token drawn at random has less, an expected one far more."""
