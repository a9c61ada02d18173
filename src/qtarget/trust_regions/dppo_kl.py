"""DPPO with a region in KL(mu || pi): the distance that was moved counts, not the ratio."""

from __future__ import annotations

from dataclasses import dataclass

from qtarget.core.regions import DivergenceRegion, rollout_kl
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import TokenView


@dataclass(frozen=True)
class DPPOKL(DivergenceRegion):
    """``L = -sg(min(r, C) M) A log pi``; ``M = 0`` where ``A (r - 1) > 0`` and ``D > delta``, ``D`` the KL(mu || pi).

    A rare token may grow a hundredfold and has hardly moved; a likely one that halves has moved far. Ratios see it the other
    way round.

    Args:
        delta_low, delta_high: largest ``D`` of tokens that are pushed down and up, above 0; infinity for no region.
        max_ratio: ``C``, at least 1; 20 is the authors'.
        outcomes: ``binary``, the sampled token against all others; or ``listed``, the tokens that the rollout lists and one
            outcome for the rest (its whole distribution, where that is given). Binary <= listed <= whole.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.25]).log())
        >>> rule = qtarget.get_target("dppo_kl")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(0.)

    Reference: arXiv 2602.04879 (the mask of section 4, binary and top-k). Deviations: ``|log r|`` is at most 20; a sampled
    token that the rollout does not list is part of the rest, as in the authors' code.
    """

    delta_low: float = 0.05
    delta_high: float = 0.05
    max_ratio: float = 20.0
    outcomes: str = "binary"

    name = "dppo_kl"
    formula = "-sg(min(r, C) M) A log pi, M by KL(mu || pi)"
    paper = "2602.04879"

    def moved(self, x: TokenView) -> Float[Tensor, " tokens"]:
        return rollout_kl(x, self.outcomes)
