"""Reward functions, each behind a check: what they return is a number for each completion, or one error that names them."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from trl.trainer.utils import get_callable_name, is_async_callable

from qtarget.core.errors import DataError, RewardError

GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
"""What TRL hands every reward function, beside the columns of the data."""


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """Stands in where a target alone teaches: TRL asks for a reward, nothing reads it."""
    return [0.0] * len(completions)


def checked_rewards(functions: Any, alone: bool, columns: Iterable[str] | None) -> list[Any]:
    """The reward functions behind checks; models and their names are TRL's to load.

    Args:
        functions: one or a list, as TRL takes them.
        alone: no environment scores too; then a single function must score every completion.
        columns: of the training data, or None where they are unknown.

    Raises:
        RewardError: one is no function.
        DataError: one asks for a column that the data does not have.
    """
    listed = [] if functions is None else list(functions) if isinstance(functions, list | tuple) else [functions]
    alone = alone and len(listed) == 1
    return [_checked(function, alone, columns) for function in listed]


def _checked(function: Any, alone: bool, columns: Iterable[str] | None) -> Any:
    if isinstance(function, str) or hasattr(function, "parameters"):  # a model, or the name of one
        return function
    if not callable(function):
        raise RewardError(
            f"reward {function!r} is a {type(function).__name__}; expected a function of (prompts, completions, **columns), a "
            "model, or the name of one"
        )
    name = get_callable_name(function)
    _refuse_absent_columns(function, name, columns)
    scored = (_scored_later if is_async_callable(function) else _scored)(function, name, alone)
    functools.update_wrapper(scored, function, updated=())
    scored.__name__ = name  # TRL names the reward's metrics by it
    return scored


def _scored(function: Any, name: str, alone: bool) -> Any:
    def scored(*args: Any, **kwargs: Any) -> list[float | None]:
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            raise _raised(function, name, error) from error
        return numbers(name, found, len(kwargs["completions"]), alone)

    return scored


def _scored_later(function: Any, name: str, alone: bool) -> Any:
    async def scored(*args: Any, **kwargs: Any) -> list[float | None]:
        try:
            found = await function(*args, **kwargs)
        except Exception as error:
            raise _raised(function, name, error) from error
        return numbers(name, found, len(kwargs["completions"]), alone)

    return scored


def _raised(function: Any, name: str, error: Exception) -> RewardError:
    text = " ".join(str(error).split())
    return RewardError(
        f"reward {name!r} raised {type(error).__name__}{f': {text}' if text else ''}{_place(function, error)}; it is called with "
        "lists: prompts, completions (texts, or lists of messages where prompts are), completion_ids and the data's columns by name"
    )


def _place(function: Any, error: Exception) -> str:
    """File and line of the user's own code: the last line of the function's file that the error came through."""
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = getattr(plain, "__code__", None) or getattr(vars(type(plain)).get("__call__"), "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is the check's own
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    if not (chosen := own or frames[:1]):
        return ""
    path = Path(chosen[-1].filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f" ({shown}, line {chosen[-1].lineno})"


def _refuse_absent_columns(function: Callable[..., Any], name: str, columns: Iterable[str] | None) -> None:
    if columns is None:
        return
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a built-in of C: no signature to read
        return
    known = GIVEN | set(columns)
    for p in parameters:
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in known:
            raise DataError(
                f"reward {name!r} asks for {p.name!r}, and the rows have no such column (they have {', '.join(sorted(columns))}); "
                "add the column, or give the parameter a default"
            )


def numbers(name: str, found: Any, count: int, alone: bool) -> list[float | None]:
    """What a reward function returned, as numbers; None where it leaves a completion to other functions.

    Raises:
        RewardError: not a list of ``count`` finite numbers; None from the only function.

    Example:
        >>> numbers("length", [1, True, None], 3, alone=False)
        [1.0, 1.0, None]
    """
    if found is None or isinstance(found, str | bytes | dict) or not hasattr(found, "__iter__"):
        raise RewardError(
            f"reward {name!r} returned {type(found).__name__}; expected a list of {count} numbers, one a completion"
        )
    values = list(found)
    if len(values) != count:
        raise RewardError(f"reward {name!r} returned {len(values)} rewards for {count} completions; expected one each")
    return [_number(name, place, value, alone) for place, value in enumerate(values)]


def _number(name: str, place: int, value: Any, alone: bool) -> float | None:
    if value is None:
        if alone:
            raise RewardError(
                f"reward {name!r} returned None for completion {place}, and nothing else scores it; expected a number: 0 for a "
                "completion that earns nothing"
            )
        return None
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(f"reward {name!r} returned {value!r} for completion {place}; expected a finite number")
    return number
