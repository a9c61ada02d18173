"""The rules under test, each with its thresholds: grids of values that the field uses, and one row without any region."""

from __future__ import annotations

from typing import Any

from qtarget.core.types import Target
from qtarget.registry import get_target

BASELINE = "policy_gradient"
"""The row ``delta = inf`` of every table."""
GRIDS: dict[str, tuple[float, ...]] = {
    BASELINE: (float("inf"),),
    "ppo_clip": (0.1, 0.2, 0.4, 0.8),
    "cispo": (1.5, 2.0, 3.0, 5.0),
    "dppo_tv": (0.05, 0.15, 0.2, 0.35),
    "dppo_kl": (0.0125, 0.05, 0.2, 0.8),
    "spo": (0.15, 0.5, 2.5, 12.5),
    "drpo": (0.15, 0.5, 2.5, 12.5),
}
"""As many thresholds for each rule: more of them would be more draws of a best."""
DEFAULTS = {"ppo_clip": 0.2, "cispo": 3.0, "dppo_tv": 0.15, "dppo_kl": 0.05, "spo": 0.5, "drpo": 0.5}


def default(name: str) -> float:
    """The threshold at which a rule's learning rate is tuned."""
    return DEFAULTS.get(name, GRIDS[name][0])


def rule(name: str, value: float) -> Target:
    """A rule with one threshold.

    Example:
        >>> rule("ppo_clip", 0.1)
        PPOClip(clip_low=0.1, clip_high=0.1)
    """
    kwargs: dict[str, dict[str, Any]] = {
        BASELINE: {},
        "ppo_clip": {"clip_low": value, "clip_high": value},
        "cispo": {"max_ratio": value},
        "dppo_tv": {"delta_low": value, "delta_high": value},
        "dppo_kl": {"delta_low": value, "delta_high": value},
        "spo": {"eps": value},
        "drpo": {"delta": value},
    }
    return get_target(name, **kwargs[name])
