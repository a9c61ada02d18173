"""Proximal SFT: PPO's clipped ratio with advantage one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.types import Needs, Target, Terms, TokenView, require


@dataclass(frozen=True)
class PSFT(Target):
    """``L = -min(r, 1 + eps)``, ``r = p_y / p_old,y``; ``a = r 1[r < 1 + eps]``, ``b = 0``. At ``r = 1`` it is sft's gradient.

    ``reference.label_log_probs`` are the *old* policy's: the model at the start of the round (with a cache of the base,
    one round over the whole run). The advantage is 1, so PPO's lower clip never binds.

    Args:
        clip_high: ``eps``, above 0; 0.28 is the paper's.

    Example:
        >>> import torch, qtarget
        >>> old = qtarget.Reference(label_log_probs=torch.tensor([0.4]).log())
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), qtarget.get_target("psft"), reference=old)  # r = 1.25
        tensor(-1.2500)

    Reference: arXiv 2508.17784. Deviations: none in the loss; refreshing the old policy is the caller's.
    """

    clip_high: float = 0.28

    name = "psft"
    formula = "-min(p_y / p_old(y), 1 + eps)"
    paper = "2508.17784"
    live_weights = True

    def __post_init__(self) -> None:
        in_range(self, "clip_high", 0, open_low=True)

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"label_log_probs"}))

    def losses(self, x: TokenView) -> Terms:
        old_log_probs = require(x.reference, "label_log_probs", self.name)
        # a label that both exclude has no ratio; one that the model excludes has the ratio 0
        gone = x.label_log_probs == -torch.inf
        log_ratio = (x.label_log_probs - old_log_probs).masked_fill(gone, -torch.inf)
        return Terms(label=-log_ratio.clamp(max=math.log1p(self.clip_high)).exp())  # clipped first: exp may overflow
