"""How well a score finds what was marked."""

from __future__ import annotations

import numpy as np


def roc_auc(scores: np.ndarray, marks: np.ndarray) -> float | None:
    """Probability that a marked item scores higher than an unmarked one, ties counting half; None without both kinds.

    Args:
        scores: ``[items]``.
        marks: ``[items]`` booleans.

    Example:
        >>> roc_auc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True]))
        0.875
    """
    marked = int(marks.sum())
    if not 0 < marked < len(marks):
        return None
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # of equal scores the mean of their ranks
    return float((ranks[marks].sum() - marked * (marked + 1) / 2) / (marked * (len(marks) - marked)))
