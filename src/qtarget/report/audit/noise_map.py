"""The synthetic map (`qtarget bench noise`): how targets did on one family of tasks, on bases that knew as much of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.report.audit.evidence import evidence

FARTHEST = 0.15
"""Difference of the share of labels that are the base's first choice, beyond which the map says nothing."""
ALIKE = 0.05
"""Difference of that share up to which two bases cannot be told apart."""


def nearest(favourite: float) -> Mapping[str, Any]:
    """The point whose base knows most nearly as much of its rows.

    Args:
        favourite: share of labels that are the base's first choice.
    """
    return min(evidence()["noise_map"]["points"], key=lambda point: abs(point["favourite_share"] - favourite))


def points_like(favourite: float) -> list[Mapping[str, Any]]:
    """All points of the bases that cannot be told from this one: several may know as much, of clean rows or of noisy ones."""
    known = evidence()["noise_map"]["points"]
    farthest = abs(nearest(favourite)["favourite_share"] - favourite) + ALIKE
    bases = {point["base"] for point in known if abs(point["favourite_share"] - favourite) <= farthest}
    return [point for point in known if point["base"] in bases]


def regrets(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How far each target that stands at all points ever is behind the best one, in points of accuracy.

    Example:
        >>> regrets([{"accuracy_percent": {"sft": [50, 0, 0], "dft": [60, 0, 0]}},
        ...          {"accuracy_percent": {"sft": [70, 0, 0], "dft": [0, 0, 0], "asft": [1, 0, 0]}}])
        {'sft': 10, 'dft': 70}
    """
    found = [point["accuracy_percent"] for point in points]
    everywhere = [name for name in found[0] if all(name in accuracy for accuracy in found)]
    best = [max(mean for mean, _, _ in accuracy.values()) for accuracy in found]
    return {
        name: max(top - accuracy[name][0] for top, accuracy in zip(best, found, strict=True)) for name in everywhere
    }


def point_words(point: Mapping[str, Any]) -> str:
    """``base that knows most: 40 % random tokens``."""
    noise = f"{100 * point['rate']:g} % {point['kind'].replace('_', ' ')}" if point["rate"] else "clean rows"
    return f"base that knows {point['base']}: {noise}"


def bases_words(points: Sequence[Mapping[str, Any]]) -> str:
    """Which bases the points are of.

    Example:
        >>> bases_words([{"base": "none"}, {"base": "most"}, {"base": "none"}])
        '3 points of noise, bases that know none or most of the format'
    """
    bases = list(dict.fromkeys(point["base"] for point in points))
    named = " or ".join(bases) if len(bases) < 3 else f"{', '.join(bases[:-1])} or {bases[-1]}"
    return f"{len(points)} points of noise, bases that know {named} of the format"


def at(points: Sequence[Mapping[str, Any]], target: str) -> dict[str, Any]:
    """A target's numbers and sft's, with their file."""
    known = evidence()["noise_map"]
    return {
        "file": known["file"],
        "seeds": known["seeds"],
        "accuracy_percent": {
            point_words(point): {name: point["accuracy_percent"][name] for name in (target, "sft")} for point in points
        },
    }
