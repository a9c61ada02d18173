"""Numbers over seeds: mean and range, differences within a seed, and what may be said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from qtarget.errors import ShapeError


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


def finding(accuracies: Mapping[str, Sequence[float]], noise: str, baseline: str = "sft") -> str:
    """One sentence: the best target, the baseline, and whether every seed agrees.

    Args:
        accuracies: target -> percent, one number a seed.
        noise: words for the noise, such as "20 % random tokens".

    Example:
        >>> finding({"sft": [50.0, 52.0], "dft": [60.0, 61.0]}, "20 % random tokens")
        'With 20 % random tokens, dft is best: 60.5 % against 51.0 % for sft, ahead in each of 2 seeds'
        >>> finding({"sft": [50.0, 52.0], "dft": [51.0, 51.5]}, "20 % random tokens")
        'With 20 % random tokens, dft is best: 51.2 % against 51.0 % for sft, but the seeds disagree'
    """
    means = {name: over_seeds(values).mean for name, values in accuracies.items()}
    best = max(means, key=lambda name: means[name])
    if best == baseline:
        others = [name for name in means if name != baseline]
        if not others:
            return f"With {noise}, {baseline} reaches {means[baseline]:.1f} %"
        second = max(others, key=lambda name: means[name])
        return _sentence(noise, baseline, second, accuracies, "no other target beats " + baseline)
    return _sentence(noise, best, baseline, accuracies, f"{best} is best")


def _sentence(noise: str, first: str, second: str, accuracies: Mapping[str, Sequence[float]], claim: str) -> str:
    ahead = paired_difference(accuracies[first], accuracies[second])
    means = over_seeds(accuracies[first]).mean, over_seeds(accuracies[second]).mean
    seeds = f"each of {ahead.count} seeds" if ahead.count > 1 else "the only seed"
    agreement = f"ahead in {seeds}" if ahead.low > 0 else "but the seeds disagree" if ahead.high > 0 else "a tie"
    return f"With {noise}, {claim}: {means[0]:.1f} % against {means[1]:.1f} % for {second}, {agreement}"
