"""Trust a token as far as its best witness does: the live model, the frozen base, or a copy that has not seen the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.products import weighted
from qtarget.core.residuals import forward_kl
from qtarget.core.types import WITNESS_FIELDS, Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class CrossfitConsensus(Target):
    """``L = -sg(w) log p_y + kappa rho KL(p_ref || p)``, ``w = s / (s + kappa rho + r)``,
    ``s = rho max(p_y, p_ref(y)) + (1 - rho) max(p_y, p_cf(y))``.

    ``p_cf`` is a cross-fitted copy of the base, which was trained on other rows (`qtarget score --crossfit`). ``rho`` is how
    reliable the base is at this token: the copies' perplexity over the base's, less where a copy expects the label and the
    base does not, ``rho = ratio (1 - max(0, p_cf(y) - p_ref(y)))``. Doubt is paid for by evidence: ``kappa = caution x
    noise_tokens`` and ``r = 0.01 caution x noise_rows``, the shares of tokens and rows that the copies find to be noise
    (`qtarget.data.crossfit.witness`). Without noise both are 0, and the rule is SFT. ``a = w``, ``b = kappa rho``, ``q = p_ref``.

    Args:
        caution: ``>= 0``, doubt for each share of noise; 0 is SFT.

    Example:
        >>> import torch, qtarget
        >>> logits, label = torch.zeros(1, 4), torch.tensor([0])
        >>> known = qtarget.Reference(
        ...     label_log_probs=torch.tensor([0.25]).log(), log_probs=logits.log_softmax(-1), crossfit=torch.tensor([0.25]),
        ...     perplexity_ratio=torch.tensor([1.0]), noise_tokens=torch.tensor([0.25]), noise_rows=torch.tensor([0.0]))
        >>> target = qtarget.get_target("crossfit_consensus", caution=4.0)
        >>> qtarget.target_loss(logits, label, target, reference=known)  # log(4) x 0.25 / (0.25 + 1)
        tensor(0.2773)

    Reference: ours. Deviations: none.
    """

    caution: float = 4.0

    name = "crossfit_consensus"
    formula = "-sg(w) log p_y + kappa rho KL(p_ref || p), w = s / (s + kappa rho + r)"
    paper = "ours"
    has_residual = True
    linear_in_frozen = True

    def __post_init__(self) -> None:
        in_range(self, "caution", 0)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs", "distribution", *WITNESS_FIELDS}))

    def losses(self, x: TokenView) -> Terms:
        assert x.on_reference is not None
        live, base = x.label_probs, require(x.reference, "label_log_probs", self.name).exp()
        copy, ratio, tokens, rows = (require(x.reference, field, self.name) for field in WITNESS_FIELDS)
        rho = ratio * (1 - (copy - base).clamp(min=0))
        support = rho * torch.maximum(live, base) + (1 - rho) * torch.maximum(live, copy)
        anchor = self.caution * tokens * rho
        doubt = anchor + NOISE_DENSITY * self.caution * rows
        # nobody's token and no doubt: 0 / 0, which is SFT
        weight = torch.where(doubt > 0, support / (support + doubt).clamp(min=torch.finfo(doubt.dtype).tiny), 1.0)
        return Terms(label=-weighted(weight, x.label_log_probs), residual=weighted(anchor, forward_kl(x.on_reference)))


NOISE_DENSITY = 0.01
"""Probability of a label at which noise is as good an explanation of it as a model's: some tokens come to mind, not a whole
vocabulary. Beside ``caution`` the one number of the rule that is a choice."""
