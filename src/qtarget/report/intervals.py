"""Intervals over rows: Wilson for shares, a seeded bootstrap for means, ratios and their paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qtarget.core.errors import ShapeError

DRAWS = 2000
COVERAGE = 95.0
NORMAL = 1.959963984540054
"""Standard deviations on either side that hold 95 % of a normal distribution."""
AT_ONCE = 4_000_000
"""Row numbers held at a time: 32 MB, and as much for each column."""


def wilson(right: float, rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): good for few rows and for shares of 0 and 1.

    Raises:
        ShapeError: no rows.

    Example:
        >>> [round(end, 4) for end in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    if rows < 1:
        raise ShapeError("no rows to take a share of")
    share, z = right / rows, NORMAL
    centre = share + z * z / (2 * rows)
    spread = z * np.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


def resampled_ratios(numerators: ArrayLike, denominators: ArrayLike, seed: int = 0) -> NDArray[np.float64]:
    """``sum(numerators) / sum(denominators)`` over resampled rows; all columns see the same draws, so they are paired.

    Args:
        numerators, denominators: ``[columns, rows]``; denominators of 1 give means.
        seed: of the resampling.

    Returns:
        ``[columns, DRAWS]``; NaN where a draw has no denominator.

    Raises:
        ShapeError: no rows, or shapes that differ.
    """
    above, below = (np.atleast_2d(np.asarray(values, np.float64)) for values in (numerators, denominators))
    if above.shape != below.shape or not above.size:
        raise ShapeError(f"numerators are {above.shape}, denominators {below.shape}; expected the same, with rows")
    rows, random, parts = above.shape[1], np.random.default_rng(seed), []
    step = max(1, AT_ONCE // rows)
    for start in range(0, DRAWS, step):
        chosen = random.integers(rows, size=(min(step, DRAWS - start), rows))
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(above[:, chosen].sum(-1) / below[:, chosen].sum(-1))
    return np.concatenate(parts, axis=1)


def ends(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the middle 95 % of draws."""
    below = (100 - COVERAGE) / 2
    low, high = np.nanpercentile(draws, [below, 100 - below])
    return float(low), float(high)


def share_interval(values: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean of values from 0 to 1 with its interval: Wilson's where all are 0 or 1, else the bootstrap's.

    Raises:
        ShapeError: no values.

    Example:
        >>> found = share_interval([1.0] * 8 + [0.0] * 2)
        >>> found["mean"], round(found["low"], 3), found["method"]
        (0.8, 0.49, 'Wilson')
    """
    if all(value in (0.0, 1.0) for value in values):
        (low, high), method = wilson(sum(values), len(values)), "Wilson"
    else:
        low, high = ends(resampled_ratios(values, np.ones(len(values)), seed)[0])
        method = "bootstrap"
    return {"mean": float(np.mean(values)), "low": low, "high": high, "method": method}


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """A ratio of sums over rows, as nats over tokens, with its bootstrap interval.

    Raises:
        ShapeError: no rows.
    """
    low, high = ends(resampled_ratios(numerators, denominators, seed)[0])
    return {"mean": float(np.sum(numerators) / np.sum(denominators)), "low": low, "high": high, "method": "bootstrap"}


def least_error(rows: int, reach: float) -> float:
    """Standard error of a difference in which a half of a row is won and a half of a row lost (Agresti and Min 2005)."""
    return reach / (rows + 2)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    denominators: Sequence[float] | None = None,
    seed: int = 0,
    *,
    reach: float = 0.0,
) -> dict[str, Any]:
    """``a - b`` over the same rows, with the bootstrap interval of the difference.

    Where no row tells the two apart, the next one may: with ``reach`` no standard error is below that of a half of a row won and
    a half of a row lost (Agresti and Min 2005), as in ``simultaneous_differences``.

    Args:
        a, b: one number a row.
        denominators: what both are sums over, as tokens; default: 1, for means.
        reach: how far apart the two can lie on one row, 1 for shares of right answers; 0 where there is no bound.

    Raises:
        ShapeError: no rows, or lengths that differ.

    Example:
        >>> paired_interval([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
        {'mean': 1.0, 'low': 1.0, 'high': 1.0, 'method': 'paired bootstrap'}
        >>> alike = paired_interval([0.0] * 12, [0.0] * 12, reach=1.0)
        >>> round(alike["low"], 2), round(alike["high"], 2)
        (-0.14, 0.14)
    """
    if len(a) != len(b):
        raise ShapeError(f"{len(a)} rows against {len(b)}; a paired difference needs the same rows")
    difference = np.subtract(a, b)
    below = np.ones(len(a)) if denominators is None else np.asarray(denominators, np.float64)
    found: dict[str, Any] = ratio_interval(difference.tolist(), below.tolist(), seed) | {"method": "paired bootstrap"}
    least = NORMAL * least_error(len(a), reach)
    if least:
        found["low"] = min(found["low"], max(-reach, found["mean"] - least))
        found["high"] = max(found["high"], min(reach, found["mean"] + least))
    return found
