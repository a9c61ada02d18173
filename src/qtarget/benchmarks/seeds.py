"""Numbers over seeds: mean and range, differences within a seed, and what may be said about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qtarget.core.errors import ShapeError

DRAWS = 2000
COVERAGE = 95.0


@dataclass(frozen=True)
class Range:
    """Mean, smallest and largest value over seeds; no distribution is assumed."""

    mean: float
    low: float
    high: float
    count: int


def over_seeds(values: Sequence[float]) -> Range:
    """Mean, minimum and maximum.

    Raises:
        ShapeError: no values.

    Example:
        >>> over_seeds([1.0, 2.0, 6.0])
        Range(mean=3.0, low=1.0, high=6.0, count=3)
    """
    if not values:
        raise ShapeError("there are no seeds to average; expected at least one value")
    return Range(fmean(values), min(values), max(values), len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Range:
    """``values - baseline``, seed by seed: both saw the same rows, noise and order in a seed.

    Raises:
        ShapeError: different numbers of seeds.

    Example:
        >>> paired_difference([3.0, 5.0], [1.0, 1.0])
        Range(mean=3.0, low=2.0, high=4.0, count=2)
    """
    if len(values) != len(baseline):
        raise ShapeError(
            f"{len(values)} seeds against {len(baseline)}; a paired difference needs the same seeds on both sides"
        )
    return over_seeds([value - base for value, base in zip(values, baseline, strict=True)])


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_means(values: ArrayLike, seed: int = 0, draws: int = DRAWS) -> NDArray[np.float64]:
    """Means over resampled seeds and, crossed with them, resampled prompts.

    The same draws serve every leading index, so what is computed of several of them (a difference, a ratio) is paired.
    Over few seeds a percentile interval is too narrow: with 5 normal values it held the true mean in 84 % of 2,000 trials.

    Args:
        values: ``[..., seeds, prompts]``; one column where prompts are not told apart.
        seed: of the resampling.

    Returns:
        ``[..., draws]``.

    Raises:
        ShapeError: no values, or not two axes.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim < 2 or not numbers.size:
        raise ShapeError(f"values have the shape {numbers.shape}; expected [..., seeds, prompts], each at least 1")
    random = np.random.default_rng(seed)
    # a resample as how often each seed or prompt is drawn: its mean is one weighted sum
    shares = [random.multinomial(n, np.full(n, 1 / n), draws) / n for n in numbers.shape[-2:]]
    return np.einsum("ds,...sp,dp->...d", shares[0], numbers, shares[1], optimize=True)


def bootstrap_interval(values: ArrayLike, seed: int = 0) -> Interval:
    """Mean with its percentile bootstrap interval, over seeds, or over seeds and prompts; see ``bootstrap_means``.

    For a paired interval pass differences, value by value.

    Args:
        values: ``[seeds]`` or ``[seeds, prompts]``.

    Raises:
        ShapeError: no values, or more than two axes.

    Example:
        >>> bootstrap_interval([3.0, 3.0, 3.0])
        Interval(mean=3.0, low=3.0, high=3.0)
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim == 1:
        numbers = numbers[:, None]
    if numbers.ndim != 2:
        raise ShapeError(f"values have the shape {numbers.shape}; expected [seeds] or [seeds, prompts]")
    low, high = percentiles(bootstrap_means(numbers, seed))
    return Interval(float(numbers.mean()), low, high)


def percentiles(draws: NDArray[Any]) -> tuple[float, float]:
    """The ends of the middle 95 % of draws; infinite draws are allowed."""
    below = (100 - COVERAGE) / 2
    # nearest: between a number and an infinite draw there is nothing to interpolate
    low, high = np.percentile(draws, [below, 100 - below], method="nearest")
    return float(low), float(high)
