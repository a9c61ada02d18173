"""Range checks of hyper-parameters, one wording for all."""

from __future__ import annotations

import math

from qtarget.core.errors import HyperparameterError
from qtarget.core.types import Target


def in_range(
    target: Target, field: str, low: float, high: float = math.inf, *, open_low: bool = False, infinite: bool = False
) -> None:
    """Refuse a hyper-parameter outside ``[low, high]`` (``(low, high]`` with ``open_low``); infinity only with ``infinite``.

    Raises:
        HyperparameterError: names the target, the field, the value and the range.
    """
    value = getattr(target, field)
    number = isinstance(value, int | float) and not isinstance(value, bool) and (infinite or math.isfinite(value))
    if not number or not low <= value <= high or (open_low and value == low):
        opening = "(" if open_low else "["
        raise HyperparameterError(f"{target.name}: {field}={value!r}; expected a number in {opening}{low:g}, {high:g}]")


def one_of(target: Target, field: str, choices: tuple[str, ...]) -> None:
    """Refuse a hyper-parameter that is none of ``choices``.

    Raises:
        HyperparameterError: names the target, the field, the value and the choices.
    """
    value = getattr(target, field)
    if value not in choices:
        raise HyperparameterError(f"{target.name}: {field}={value!r}; expected one of {', '.join(choices)}")
