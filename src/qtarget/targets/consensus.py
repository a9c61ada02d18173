"""Trust a token as far as its best witness does: the live model, the frozen base, or the other demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.checks import in_range
from qtarget.residuals import forward_kl
from qtarget.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class Consensus(Target):
    """``L = -sg(w) log p_y + lambda rho^3 (1 - (A - p_ref(y))^+) KL(p_ref || p)``, ``w = s / (s + tau rho^3)``,
    ``s = rho max(p_y, p_ref(y)) + (1 - rho) max(p_y, A)``.

    ``A`` is the agreement of the other demonstrations with the label (`qtarget.data.agreement`), ``rho`` how much of what
    they agree on the base knew (`prior_reliability`). Where the base knew nothing (``rho`` near 0) the rule is SFT on
    tokens that some other row supports; where it knew nearly all, DFT's weight in odds, anchored to the base. ``a = w``,
    ``b = lambda rho^3 (...)``, ``q = p_ref``. Where the demonstrations agree against the base, the anchor lets go.

    Args:
        kl_weight: ``lambda >= 0``; 3 is ours.
        doubt: ``tau >= 0``: the support at which a token has half its weight, for a base that knows all; 1 is ours.

    Example:
        >>> import torch, qtarget
        >>> logits, label = torch.zeros(1, 4), torch.tensor([0])
        >>> known = qtarget.Reference(
        ...     label_log_probs=torch.tensor([0.25]).log(), log_probs=logits.log_softmax(-1),
        ...     agreement=torch.tensor([0.25]), reliability=torch.tensor([1.0]))
        >>> target = qtarget.get_target("consensus", doubt=0.25)
        >>> qtarget.target_loss(logits, label, target, reference=known)  # log(4) / 2
        tensor(0.6931)

    Reference: ours. Deviations: none.
    """

    kl_weight: float = 3.0
    doubt: float = 1.0

    name = "consensus"
    formula = "-sg(w) log p_y + lambda rho^3 (1 - (A - p_ref)^+) KL(p_ref || p), w = s / (s + tau rho^3)"
    paper = "ours"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "kl_weight", 0)
        in_range(self, "doubt", 0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs", "distribution", "agreement", "reliability"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None
        live, base = x.label_probs, require(x.reference, "label_log_probs", self.name).exp()
        others = require(x.reference, "agreement", self.name)
        rho = require(x.reference, "reliability", self.name)
        support = rho * torch.maximum(live, base) + (1 - rho) * torch.maximum(live, others)
        weight = support / (support + self.doubt * rho**3).clamp(min=TINY)
        anchor = self.kl_weight * rho**3 * (1 - (others - base).clamp(min=0))
        return Terms(label=-weight * x.label_log_probs, residual=anchor * forward_kl(x.on_reference))


TINY = 1e-12
"""Keeps ``0 / 0`` a zero: a token that nobody supports and a base that knows nothing."""
