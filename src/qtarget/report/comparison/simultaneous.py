"""Differences to a baseline that hold together: over rows, over seeds of training, and for all contenders at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qtarget.core.errors import ShapeError
from qtarget.report.intervals import least_error

DRAWS = 4000
COVERAGE = 95.0


@dataclass(frozen=True)
class Differences:
    """Each contender minus the first, larger is better.

    Attributes:
        levels: ``[contenders]`` means over seeds and rows.
        means, lows, highs: ``[contenders - 1]``; the 95 % intervals hold for all of them together.
        seed_deviations: ``[contenders]`` standard deviations between seeds of a contender's mean; 0 for one seed.
        confidences: ``[contenders - 1]`` in 0 .. 1, that it is better than the first: how seldom the largest of that many
            chance differences comes up to this one, in standard errors.
        enough_rows: ``[contenders - 1]`` with which a gain as large as this one would be shown; inf where seeds alone hide
            it, or where there is no gain.
    """

    levels: NDArray[np.float64]
    means: NDArray[np.float64]
    lows: NDArray[np.float64]
    highs: NDArray[np.float64]
    seed_deviations: NDArray[np.float64]
    confidences: NDArray[np.float64]
    enough_rows: NDArray[np.float64]


def simultaneous_differences(
    scores: ArrayLike,
    weights: ArrayLike | None = None,
    groups: Sequence[int] | None = None,
    seed: int = 0,
    *,
    reach: float = 0.0,
) -> Differences:
    """Means of every contender minus the first one's, with simultaneous 95 % intervals.

    Two things vary. Rows: groups of them are drawn again and again, the same for all contenders and seeds, so that
    differences are paired. Seeds of training: three values cannot be resampled, so their variance is estimated (pooled
    over the contenders, or a contender's own where that is larger) and drawn from a t distribution. The factor that
    widens all intervals is the 95 % quantile of the largest deviation among the contenders, in standard errors
    (max-t; Westfall and Young 1993): the best of many is not called better because there were many.

    Where no row tells two contenders apart, nothing varies in the rows drawn, and yet the next row may tell them apart. So
    no standard error is below that of a half of a row won and a half of a row lost (Agresti and Min 2005, paired
    proportions).

    Args:
        scores: ``[contenders, seeds, rows]``, the baseline first.
        weights: ``[rows]``, as tokens for nats a token; default: 1. A row of weight 0 is as if it were not there.
        groups: ``[rows]``, equal for rows that are drawn together, as those of one prompt; default: each its own.
        seed: of the draws.
        reach: how far apart the scores of one row can lie, 1 for shares of right answers; 0 where there is no bound.

    Raises:
        ShapeError: fewer than two contenders, no seeds or rows, or lengths that differ.

    Example:
        >>> found = simultaneous_differences([[[0.0, 0.0]] * 3, [[1.0, 1.0]] * 3])
        >>> found.means.tolist(), found.lows.tolist()
        ([1.0], [1.0])
        >>> alike = simultaneous_differences([[[0.0, 1.0] * 10] * 3] * 2, reach=1.0)
        >>> alike.means.tolist(), [round(float(end), 2) for end in (alike.lows[0], alike.highs[0])]
        ([0.0], [-0.09, 0.09])
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 3 or len(values) < 2 or not values.size:
        raise ShapeError(f"scores have the shape {values.shape}; expected [contenders >= 2, seeds, rows]")
    values, weight, names = _judging(values, weights, groups)
    sums, shares = _grouped(values, weight, names)
    levels = sums.sum(-1) / shares.sum()
    means = levels.mean(-1)
    random = np.random.default_rng(seed)
    by_rows = (_row_draws(sums.mean(1), shares, random) - means[:, None]) * _widening(len(shares), random)
    apart = by_rows[1:] - by_rows[0]
    apart += _unseen_rows(apart.std(-1), least_error(len(shares), reach), random)
    deviations = _seed_deviations(sums / shares.sum(), levels)
    by_seeds = _seed_draws(deviations, values.shape[1], random)
    found, moved = means[1:] - means[0], apart + by_seeds[1:] - by_seeds[0]
    errors = moved.std(-1)
    safe = np.where(errors > 0, errors, 1.0)
    chance = moved / safe[:, None]
    factor = np.percentile(np.abs(chance).max(0), COVERAGE)
    confidences = (chance.max(0) < (found / safe)[:, None]).mean(-1)
    rows, seeds = apart.var(-1) * values.shape[-1], (by_seeds[1:] - by_seeds[0]).var(-1)
    enough = _enough(found / factor if factor else found, rows, seeds)
    ends = found - factor * errors, found + factor * errors
    return Differences(means, found, *ends, deviations, np.where(errors > 0, confidences, found > 0), enough)


def _enough(
    largest_error: NDArray[np.float64], row: NDArray[np.float64], seeds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Rows with which the standard error comes down to the largest one that shows the difference.

    Args:
        row, seeds: variances, one row's and all seeds'.
    """
    room = np.where(largest_error > 0, largest_error**2 - seeds, 0.0)
    return np.divide(row, room, where=room > 0, out=np.full(len(room), np.inf))


def _judging(
    values: NDArray[np.float64], weights: ArrayLike | None, groups: Sequence[int] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any]]:
    """Scores, weights and groups of the rows of a weight above 0: the others are no rows to be drawn.

    Raises:
        ShapeError: there is none, or lengths differ.
    """
    rows = values.shape[-1]
    weight = np.ones(rows) if weights is None else np.asarray(weights, np.float64)
    names = np.arange(rows) if groups is None else np.asarray(groups)
    if weight.shape != (rows,) or names.shape != (rows,):
        raise ShapeError(f"{rows} rows, weights {weight.shape}, groups {names.shape}; expected one a row")
    kept = weight > 0
    if not kept.any():
        raise ShapeError(f"all {rows} rows have weight 0; expected some that judge")
    return values[..., kept], weight[kept], names[kept]


def _grouped(
    values: NDArray[np.float64], weight: NDArray[np.float64], names: NDArray[Any]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted sums ``[contenders, seeds, groups]`` and the weights' own, ``[groups]``."""
    _, places = np.unique(names, return_inverse=True)
    belongs = np.zeros((len(weight), int(places.max()) + 1))
    belongs[np.arange(len(weight)), places] = 1.0
    return (values * weight) @ belongs, weight @ belongs


def _seed_deviations(parts: NDArray[np.float64], levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[contenders]``: between seeds, without what the rows drawn here add to it (two-way random effects).

    Args:
        parts: ``[contenders, seeds, groups]`` that sum to the levels.
        levels: ``[contenders, seeds]``.
    """
    seeds, groups = parts.shape[1:]
    if seeds < 2 or groups < 2:
        return np.zeros(len(parts))
    centred = parts - parts.mean(1, keepdims=True)
    rest = centred - centred.mean(2, keepdims=True)
    noise = groups * (rest**2).sum((1, 2)) / ((seeds - 1) * (groups - 1))
    between = levels.var(-1, ddof=1) - noise
    return np.sqrt(np.maximum(between, 0.0))


def _row_draws(sums: NDArray[np.float64], shares: NDArray[np.float64], random: np.random.Generator) -> NDArray:
    """``[contenders, DRAWS]``: means over groups of rows drawn anew."""
    counts = random.multinomial(len(shares), np.full(len(shares), 1 / len(shares)), DRAWS).astype(np.float64)
    total = counts @ shares
    return np.divide(counts @ sums.T, total[:, None], where=total[:, None] > 0, out=np.zeros((DRAWS, len(sums)))).T


def _widening(groups: int, random: np.random.Generator) -> NDArray[np.float64] | float:
    """``[DRAWS]``: drawing few groups anew understates how far they may be off, by the variance's divisor and its own luck.

    With these factors the interval is Student's; without them that of 4 groups holds 8 times in 10.
    """
    if groups < 2:
        return 1.0
    return np.sqrt(groups / random.chisquare(groups - 1, DRAWS))


def _unseen_rows(errors: NDArray[np.float64], floor: float, random: np.random.Generator) -> NDArray[np.float64]:
    """``[contenders - 1, DRAWS]``: what lifts standard errors of the rows to the floor; zeros where they reach it."""
    missing = np.sqrt(np.maximum(floor**2 - errors**2, 0.0))
    return (
        missing[:, None] * random.standard_normal((len(errors), DRAWS)) if missing.any() else np.zeros((len(errors), 1))
    )


def _seed_draws(deviations: NDArray[np.float64], seeds: int, random: np.random.Generator) -> NDArray:
    """``[contenders, DRAWS]``: what other seeds of training would move the means by."""
    if seeds < 2:
        return np.zeros((len(deviations), DRAWS))
    freedom = len(deviations) * (seeds - 1)
    pooled = np.sqrt(np.mean(deviations**2))
    scale = np.maximum(deviations, pooled) / np.sqrt(seeds)
    widened = np.sqrt(freedom / random.chisquare(freedom, DRAWS))
    return scale[:, None] * random.standard_normal((len(deviations), DRAWS)) * widened
