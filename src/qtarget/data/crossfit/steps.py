"""How long a copy learns where nobody says it: few rows are seen several times."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

PASSES = 2
"""Over a copy's rows, where these are many."""
FEWEST_STEPS = 150
"""A LoRA needs steps, however few its rows: of 90 rows in a format that the base does not know (9.2 nats a token at a typical
one), 12 steps at 5e-4 left 8.0, 60 steps at 1e-3 left 2.8 and 113 left 2.0 (`benchmarks/results/copies.json`)."""
MOST_PASSES = 20
"""Over its rows, where these are few: beyond, a copy learns them by heart."""


def default_steps(
    rows: int, batch: int, passes: int = PASSES, fewest: int = FEWEST_STEPS, most_passes: int = MOST_PASSES
) -> int:
    """Optimizer steps of a copy: so many passes, but at least ``fewest`` steps, of which no more than ``most_passes`` need.

    Args:
        rows: that the copy learns.
        batch: rows a step.

    Example:
        >>> [default_steps(rows, 8) for rows in (45, 300, 6000)]
        [113, 150, 1500]
    """
    return min(max(ceil(passes * rows / batch), fewest), ceil(max(passes, most_passes) * rows / batch))


def stated_steps(steps: int | None) -> dict[str, int | None]:
    """How long a copy learns, as a recipe's record says it."""
    rule = (PASSES, FEWEST_STEPS, MOST_PASSES) if steps is None else (None,) * 3
    return {"steps": steps} | dict(zip(("passes", "fewest_steps", "most_passes"), rule, strict=True))


def steps_of(told: Mapping[str, Any]) -> tuple[int, float]:
    """Optimizer steps of a cross-fit's copies, and how often each saw its rows, by a manifest's ``crossfit``.

    Example:
        >>> steps_of({"rows": [45, 45], "recipe": {"steps": 90, "batch_size": 8}})
        (90, 16.0)
        >>> steps_of({"rows": [45, 45], "recipe": {"batch_size": 8} | stated_steps(None)})[0]
        113
    """
    recipe, (learnt, batch) = told.get("recipe", {}), _learnt(told)
    # caches of 0.1 say passes alone
    passes = recipe.get("passes") or PASSES
    rule = passes, recipe.get("fewest_steps") or 1, recipe.get("most_passes") or passes
    steps = int(recipe.get("steps") or default_steps(learnt, batch, *rule))
    return steps, steps * batch / learnt


def sensible_steps(told: Mapping[str, Any]) -> int:
    """Optimizer steps that the default recipe takes on a cross-fit's rows, by a manifest's ``crossfit``.

    Example:
        >>> sensible_steps({"rows": [45, 45], "recipe": {"steps": 5, "batch_size": 8}})
        113
    """
    return default_steps(*_learnt(told))


def _learnt(told: Mapping[str, Any]) -> tuple[int, int]:
    """Rows that a copy learns, at most, and rows a step."""
    rows = told.get("rows", [1, 1])
    return max(1, sum(rows) - min(rows)), int(told.get("recipe", {}).get("batch_size") or 8)
