"""One kind of rows or two: a skewed component with a long tail alone, or with a bump beyond it; asked of held-out rows.

The good component is normal below its mode and exponential above: for a base that is calibrated on a text,
``P(-log p > u)`` falls like ``exp(-u)``, so its most surprising tokens have such a tail and no longer one. The bad component
has its own spread on either side of its mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

BINS = 300
"""Rows are counted on a grid before anything is fitted, so that a million cost what a thousand do."""
FOLDS = 5
STEPS = 60
ROUNDS = 12
"""Of the fixed point that gives a component's two spreads."""
NARROWEST = 0.5
"""Nats: no side of a component is narrower. What is finer says nothing of noise, and a spike is no kind of rows."""
TOLERANCE = 1e-7
"""Nats a row by which a step of the fit has to get better."""

Tail = Literal["normal", "exponential"]
HALF_NORMAL = float(np.sqrt(np.pi / 2))
"""Mass of half of a normal density of height and spread 1."""


@dataclass(frozen=True)
class Component:
    """A density of one hump: normal of spread ``left`` below its mode, ``tail`` of spread ``right`` above; nats."""

    mode: float
    left: float
    right: float
    tail: Tail

    @property
    def mean(self) -> float:
        """Of the scores under it."""
        return self.mode + (self.right**2 - self.left**2) / self._mass

    @property
    def _mass(self) -> float:
        return HALF_NORMAL * self.left + (1 if self.tail == "exponential" else HALF_NORMAL) * self.right

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """``[points]``."""
        step = x - self.mode
        above = step / self.right if self.tail == "exponential" else 0.5 * (step / self.right) ** 2
        return -np.log(self._mass) - np.where(step < 0, 0.5 * (step / self.left) ** 2, above)


@dataclass(frozen=True)
class Mixture:
    """Good rows, and a ``share`` of bad ones above them."""

    good: Component
    bad: Component
    share: float

    def log_densities(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``[points]`` of either component, each with the log of its share."""
        return np.log1p(-self.share) + self.good.log_density(x), np.log(self.share) + self.bad.log_density(x)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """``[points]``."""
        return np.logaddexp(*self.log_densities(x))

    def posterior(self, x: np.ndarray) -> np.ndarray:
        """``[points]`` P(bad), which never falls as the score rises.

        A wide bad component would claim what lies below the good ones, and a long tail what lies above the bad ones.
        """
        grid = np.sort(x)
        found = np.maximum.accumulate(np.where(grid <= self.good.mode, 0, _share_of(*self.log_densities(grid))))
        return found[np.searchsorted(grid, x)]


def _share_of(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.clip(good - bad, -700, 700)))


def fit_component(x: np.ndarray, weights: np.ndarray, tail: Tail) -> Component:
    """Maximum likelihood over all modes on the grid.

    Args:
        x: ``[bins]`` ascending.
        weights: ``[bins]`` how much each counts.
    """
    w, wx, wxx = (np.cumsum(weights * x**power) for power in range(3))
    total = max(w[-1], 1e-300)
    left = np.maximum(w * x**2 - 2 * wx * x + wxx, 0)  # for each mode, the sum of squares below it
    above, sums = w[-1] - w, wx[-1] - wx
    exponential = tail == "exponential"
    right = sums - above * x if exponential else above * x**2 - 2 * sums * x + (wxx[-1] - wxx)
    right, scale = np.maximum(right, 0), 1.0 if exponential else HALF_NORMAL
    a = b = np.full_like(x, 1.0)
    for _ in range(ROUNDS):  # the derivatives by both spreads are 0, given the mass under a density of height 1
        mass = HALF_NORMAL * a + scale * b
        a = np.maximum(np.cbrt(left * mass / (HALF_NORMAL * total)), NARROWEST)
        b = np.sqrt(right * mass / total) if exponential else np.cbrt(right * mass / (HALF_NORMAL * total))
        b = np.maximum(b, NARROWEST)
    cost = right / b if exponential else right / (2 * b**2)
    best = int(np.argmin(total * np.log(HALF_NORMAL * a + scale * b) + left / (2 * a**2) + cost))
    return Component(float(x[best]), float(a[best]), float(b[best]), tail)


def fit_mixture(x: np.ndarray, counts: np.ndarray, split: float) -> tuple[Mixture, float]:
    """Expectation maximisation from one start: what lies above ``split`` is bad.

    Args:
        x: ``[bins]`` ascending.
        counts: ``[bins]`` rows in each.

    Returns:
        The mixture, and its log likelihood.
    """
    total, bad = counts.sum(), np.where(x > split, 0.98, 0.02)
    mixture, before, likelihood = None, -np.inf, -np.inf
    for _ in range(STEPS):
        share = float(np.clip((counts * bad).sum() / total, 1e-9, 1 - 1e-9))
        parts = fit_component(x, counts * (1 - bad), "exponential"), fit_component(x, counts * bad, "normal")
        mixture = Mixture(*parts, share)
        good, upper = mixture.log_densities(x)
        likelihood = float((counts * np.logaddexp(good, upper)).sum())
        if likelihood - before < TOLERANCE * total:
            break
        bad, before = _share_of(good, upper), likelihood
    assert mixture is not None
    return mixture, likelihood


STARTS = (0.5, 0.7, 0.9, 0.97)
"""Shares of the rows below the places at which a fit may begin; the middle of the range is one more."""


def best_mixture(x: np.ndarray, counts: np.ndarray, starts: Sequence[float] | None = None) -> tuple[Mixture, float]:
    """The likeliest of the fits from several starts whose bad component lies above the good one, and its start."""
    if starts is None:
        cumulated = np.cumsum(counts) / counts.sum()
        starts = [*(float(x[np.searchsorted(cumulated, q)]) for q in STARTS), float((x[0] + x[-1]) / 2)]
    fits = [(*fit_mixture(x, counts, split), split) for split in sorted(set(starts))]
    mixture, _, split = max(fits, key=lambda fit: (fit[0].bad.mode > fit[0].good.mode, fit[1]))
    return mixture, split


@dataclass(frozen=True)
class Comparison:
    """Two components against one.

    Attributes:
        mixture: of all rows.
        gain: nats by which two beat one on held-out rows, all folds together.
        error: its standard error.
    """

    mixture: Mixture
    gain: float
    error: float


def compare(scores: np.ndarray, seed: int = 0) -> Comparison | None:
    """Fit one and two components to four fifths of the rows, ask both about the rest, five times.

    Args:
        scores: ``[rows]``, nats.
        seed: of the folds.

    Returns:
        None where all scores are nearly one number.
    """
    low, high = float(scores.min()), float(scores.max())
    if high - low < NARROWEST:
        return None
    x = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    places = np.clip(((scores - low) / (high - low) * BINS).astype(np.int64), 0, BINS - 1)
    whole, split = best_mixture(x, np.bincount(places, minlength=BINS).astype(float))
    folds = np.random.default_rng(seed).permutation(len(scores)) % FOLDS
    gains = np.zeros(len(scores))
    for fold in range(FOLDS):
        counts = np.bincount(places[folds != fold], minlength=BINS).astype(float)
        one, (two, _) = (
            fit_component(x, counts, "exponential"),
            best_mixture(x, counts, [split, float(np.median(scores))]),
        )
        gains[folds == fold] = (two.log_density(x) - one.log_density(x))[places[folds == fold]]
    return Comparison(whole, float(gains.sum()), float(gains.std() * np.sqrt(len(gains))))
