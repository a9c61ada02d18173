"""Means with their intervals, and Markdown tables of them: one form for all benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from numpy.typing import ArrayLike

from qtarget.benchmarks.seeds import bootstrap_interval


def rounded_interval(values: ArrayLike, digits: int = 2) -> dict[str, float]:
    """Mean and bootstrap interval, for a file.

    Args:
        values: as for ``bootstrap_interval``.

    Example:
        >>> rounded_interval([3.0, 3.0])
        {'mean': 3.0, 'low': 3.0, 'high': 3.0}
    """
    found = bootstrap_interval(values)
    return {end: round(getattr(found, end), digits) for end in ("mean", "low", "high")}


def with_ends(row: Mapping[str, float], mean: str = ".1f", ends: str = ".0f") -> str:
    """A mean with its interval, in these formats.

    Example:
        >>> with_ends({"mean": 42.51, "low": 40.0, "high": 45.0})
        '42.5 (40..45)'
    """
    return f"{row['mean']:{mean}} ({row['low']:{ends}}..{row['high']:{ends}})"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table.

    Example:
        >>> print(markdown_table(["a", "b"], [["1", "2"]]), end="")
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"
