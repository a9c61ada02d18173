"""Trust a token as far as its best witness does: the live model, the frozen base, or the other demonstrations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import forward_kl
from qtarget.core.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class Consensus(Target):
    """``L = -sg(w) log p_y + 3 kappa rho^3 KL(p_ref || p)``, ``w = s / (s + kappa (rho^3 + 0.01))``,
    ``s = rho max(p_y, p_ref(y)) + (1 - rho) max(p_y, A)``.

    ``A`` is the agreement of the other demonstrations with the label (`qtarget.data.agreement`), ``rho`` how reliable the
    base is at this token (`prior_reliability` x (1 - `prior_conflict`)). Where it is not (``rho`` near 0) the rule is SFT on
    tokens that some other row supports; where it is, a weight that halves at ``s = kappa``, anchored to the base. At
    ``kappa = 0`` it is SFT. ``a = w``, ``b = 3 kappa rho^3``, ``q = p_ref``.

    Args:
        caution: ``kappa >= 0``; 1 is ours, 0 is sft; of 0.03, 1 and 3 tuning chose 1 at 10 of 12 noisy points, else 0.03.

    Example:
        >>> import torch, qtarget
        >>> logits, label = torch.zeros(1, 4), torch.tensor([0])
        >>> known = qtarget.Reference(
        ...     label_log_probs=torch.tensor([0.25]).log(), log_probs=logits.log_softmax(-1),
        ...     agreement=torch.tensor([0.25]), reliability=torch.tensor([1.0]))
        >>> target = qtarget.get_target("consensus", caution=1.0)
        >>> qtarget.target_loss(logits, label, target, reference=known)  # log(4) x 0.25 / (0.25 + 1.01)
        tensor(0.2751)

    Reference: ours. Deviations: none.
    """

    caution: float = 1.0

    name = "consensus"
    formula = "-sg(w) log p_y + 3 kappa rho^3 KL(p_ref || p), w = s / (s + kappa (rho^3 + 0.01))"
    paper = "ours"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "caution", 0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs", "distribution", "agreement", "reliability"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None
        live, base = x.label_probs, require(x.reference, "label_log_probs", self.name).exp()
        others = require(x.reference, "agreement", self.name)
        rho = require(x.reference, "reliability", self.name)
        support = rho * torch.maximum(live, base) + (1 - rho) * torch.maximum(live, others)
        doubt = self.caution * (rho**3 + FLOOR)
        tiny = torch.finfo(support.dtype).tiny  # nobody's token and hardly any caution: 0 / 0
        weight = support / (support + doubt).clamp(min=tiny) if self.caution else torch.ones_like(support)
        anchor = ANCHOR * self.caution * rho**3
        return Terms(label=-weighted(weight, x.label_log_probs), residual=weighted(anchor, forward_kl(x.on_reference)))


FLOOR = 0.01
"""Doubt about a token where the base says nothing: a drawn token's agreement is about this, an expected one's far above."""
ANCHOR = 3.0
"""Weight of the anchor against the doubt."""
