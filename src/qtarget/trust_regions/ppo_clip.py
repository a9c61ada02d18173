"""PPO's clipped ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.checks import in_range
from qtarget.core.regions import TrustRegion, advantages, log_ratio
from qtarget.core.types import Terms, TokenView


@dataclass(frozen=True)
class PPOClip(TrustRegion):
    """``L = -min(r A, clip(r, 1 - lo, 1 + hi) A)``; ``a = r A`` inside, 0 where ``A > 0, r > 1 + hi`` or ``A < 0, r < 1 - lo``.

    Args:
        clip_low, clip_high: ``lo`` in (0, 1], ``hi`` above 0; 0.2 is PPO's, 0.28 above is DAPO's.

    Example:
        >>> import torch, qtarget
        >>> sampled = qtarget.Reference(label_log_probs=torch.tensor([0.25]).log())
        >>> rule = qtarget.get_target("ppo_clip")
        >>> qtarget.target_loss(torch.zeros(1, 2), torch.tensor([0]), rule, advantages=torch.tensor([1.0]), rollout=sampled)
        tensor(-1.2800)

    Reference: arXiv 1707.06347 (eq. 7); two thresholds: arXiv 2503.14476. Deviations: ``|log r|`` is at most 20.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28

    name = "ppo_clip"
    formula = "-min(r A, clip(r, 1 - lo, 1 + hi) A)"
    paper = "1707.06347"

    def __post_init__(self) -> None:
        in_range(self, "clip_low", 0, 1, open_low=True)
        in_range(self, "clip_high", 0, open_low=True, infinite=True)

    def losses(self, x: TokenView) -> Terms:
        ratio, advantage = log_ratio(x).exp(), advantages(x)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return Terms(label=-torch.minimum(ratio * advantage, clipped * advantage))
