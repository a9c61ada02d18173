"""Numbers that are typed after options."""

from __future__ import annotations

import math

import typer


def finite(value: float) -> float:
    """Refuse ``nan`` and ``inf``, which pass an option's own range: every comparison with NaN is false.

    Raises:
        typer.BadParameter: which the command line words by itself.
    """
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value
