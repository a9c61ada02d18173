"""Whether a completion is right: one small function a way to judge, and the choice between them by name."""

from __future__ import annotations

import importlib
import json
import math
import operator
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtarget.core.errors import ConfigError, DataError, MissingDependencyError

METRICS = ("exact", "regex", "number", "json")
"""Judges by name; ``package.module:function`` is one of the user's."""
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
"""A Markdown block that is all of a completion."""


class UnfitReference(ValueError):
    """A reference that this judge cannot compare with anything; the caller knows its row."""


@dataclass(frozen=True)
class Judge:
    """A way to judge.

    Attributes:
        name: as the user gave it.
        score: of prompt, completion, reference text and row.
        fit: raises ``UnfitReference`` for a reference that cannot be compared.
    """

    name: str
    score: Callable[[str, str, str, Mapping[str, Any]], Any]
    fit: Callable[[str], Any]


def exact_match(completion: str, reference: str, ignore_case: bool = False) -> bool:
    """Whether two texts are the same but for white space around them.

    Example:
        >>> exact_match(" Paris\\n", "paris"), exact_match(" Paris", "paris", ignore_case=True)
        (False, True)
    """
    a, b = completion.strip(), reference.strip()
    return a.casefold() == b.casefold() if ignore_case else a == b


def captured(text: str, pattern: re.Pattern[str]) -> str | None:
    """What the first group of a pattern holds at its last match: answers stand at the end.

    Example:
        >>> captured("first #### 1, at last #### 2", re.compile("#### ([0-9]+)"))
        '2'
    """
    found = None
    for match in pattern.finditer(text):
        found = match.group(1)
    return found


def same_capture(completion: str, reference: str, pattern: re.Pattern[str], ignore_case: bool = False) -> bool:
    """Whether a pattern captures the same in both texts; False where the completion has no match.

    Raises:
        UnfitReference: the reference has none.

    Example:
        >>> same_capture("It is [B].", "So [B]", re.compile(r"\\[(.*?)\\]"))
        True
    """
    wanted = captured(reference, pattern)
    if wanted is None:
        raise UnfitReference(f"does not match the pattern {pattern.pattern!r}")
    found = captured(completion, pattern)
    return found is not None and exact_match(found, wanted, ignore_case)


def same_number(completion: str, reference: str) -> bool:
    """Whether math-verify finds the same number (or expression) in both texts.

    Raises:
        UnfitReference: it finds none in the reference.
        MissingDependencyError: math-verify is not installed.
    """
    verify = _math_verify().verify
    wanted = numbers_of(reference)
    if not wanted:
        raise UnfitReference("holds no number that math-verify finds")
    return bool(verify(wanted, numbers_of(completion), **_timeout("timeout_seconds")))


def numbers_of(text: str) -> list[Any]:
    """What math-verify reads out of a text; empty if nothing.

    Raises:
        MissingDependencyError: math-verify is not installed.
    """
    return _math_verify().parse(text, **_timeout("parsing_timeout"))


def _timeout(name: str) -> dict[str, Any]:
    # math-verify stops itself by a signal, which only the main thread gets
    return {} if threading.current_thread() is threading.main_thread() else {name: None}


def _math_verify() -> Any:
    try:
        return importlib.import_module("math_verify")
    except ImportError as error:
        raise MissingDependencyError(
            "the metric `number` compares numbers with math-verify; run `pip install 'qtarget[evaluate]'`, or choose "
            "--metric regex"
        ) from error


def same_json(completion: str, reference: str) -> bool:
    """Whether both texts are JSON of the same value; the order of keys and a Markdown fence do not count.

    Raises:
        UnfitReference: the reference is no JSON.

    Example:
        >>> same_json('{"b": [1, 2.0], "a": null}', '{"a": null, "b": [1.0, 2]}'), same_json("true", "1")
        (True, False)
    """
    try:
        wanted = json_value(reference)
    except (ValueError, RecursionError) as error:
        raise UnfitReference(f"is not JSON ({error})") from error
    try:
        return _equal(json_value(completion), wanted)
    except (ValueError, RecursionError):
        return False


def json_value(text: str) -> Any:
    """The value of a JSON text, a Markdown fence around it left out.

    Raises:
        ValueError, RecursionError: it is none; NaN and Infinity are not JSON.
    """
    fenced = FENCE.fullmatch(text.strip())
    return json.loads(fenced.group(1) if fenced else text.strip(), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _equal(a: Any, b: Any) -> bool:
    """JSON's equality: 1 is 1.0, but not true."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def share(value: Any) -> float:
    """A judge's answer as a number: booleans, and numbers from 0 to 1 (NumPy's and torch's too).

    Raises:
        ValueError: anything else.

    Example:
        >>> share(True), share(0.25)
        (1.0, 0.25)
    """
    plain = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if not isinstance(plain, bool | int | float) or math.isnan(plain) or not 0 <= plain <= 1:
        raise ValueError(f"returned {value!r} ({type(value).__name__}); expected True, False, or a number from 0 to 1")
    return float(plain)


def make_judge(
    metric: str, *, pattern: str | None = None, ignore_case: bool = False, more: Sequence[str] = ()
) -> Judge:
    """A judge by its name.

    Args:
        metric: one of ``METRICS``, or ``package.module:function``, which is called with prompt, completion and row.
        pattern: for ``regex``, with a group for the answer.
        ignore_case: for ``exact`` and ``regex``.
        more: metrics that the caller knows beside those, for the error's words.

    Raises:
        ConfigError: no such metric, a pattern that is none, or an option that the metric does not read.
        MissingDependencyError: math-verify is not installed.
    """
    _check_options(metric, pattern, ignore_case, more)
    if metric == "exact":
        return Judge(metric, lambda _, text, wanted, row: exact_match(text, wanted, ignore_case), lambda wanted: None)
    if metric == "regex":
        found = compiled(pattern or "", ignore_case)
        return _of_two(metric, lambda text, wanted: same_capture(text, wanted, found, ignore_case))
    if metric == "number":
        _math_verify()
        return _of_two(metric, same_number)
    if metric == "json":
        return _of_two(metric, same_json)
    return Judge(metric, _outside(metric), lambda wanted: None)


def _of_two(name: str, same: Callable[[str, str], bool]) -> Judge:
    # a reference that fits is one that can be compared, with itself to begin with
    return Judge(name, lambda _, text, wanted, row: same(text, wanted), lambda wanted: same(wanted, wanted))


def _check_options(metric: str, pattern: str | None, ignore_case: bool, more: Sequence[str]) -> None:
    if metric not in METRICS and ":" not in metric:
        raise ConfigError(
            f"--metric {metric!r} is unknown; expected {', '.join((*METRICS, *more))}, or package.module:function"
        )
    if (metric == "regex") != (pattern is not None):
        reason = "is read by --metric regex alone" if pattern is not None else "is missing: --metric regex needs one"
        raise ConfigError(f"--pattern {reason}, with a group for the answer, as '#### (.+)'")
    if ignore_case and metric not in ("exact", "regex"):
        raise ConfigError(f"--ignore-case is read by --metric exact and regex; {metric} has no use for it")


def compiled(pattern: str, ignore_case: bool = False) -> re.Pattern[str]:
    """A pattern with a group.

    Raises:
        ConfigError: it does not compile, or captures nothing.
    """
    try:
        found = re.compile(pattern, re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise ConfigError(f"--pattern {pattern!r} is no regular expression: {error}") from error
    if not found.groups:
        raise ConfigError(f"--pattern {pattern!r} captures nothing; put the answer in parentheses, as '#### (.+)'")
    return found


def _outside(metric: str) -> Callable[[str, str, str, Mapping[str, Any]], Any]:
    module, _, path = metric.partition(":")
    try:
        function = operator.attrgetter(path)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # the module's own code runs here, and may raise anything
        raise ConfigError(
            f"--metric {metric}: {type(error).__name__}: {error}; expected package.module:function, importable from the "
            "current folder"
        ) from error
    if not callable(function):
        raise ConfigError(f"--metric {metric} is a {type(function).__name__}; expected a function")
    return lambda prompt, text, wanted, row: function(prompt, text, dict(row))


def judged(judge: Judge, prompt: str, completion: str, reference: str, row: Mapping[str, Any], where: str) -> float:
    """The share of 1 that a judge gives a completion.

    Args:
        where: the row, for errors: ``rows.jsonl, row 3``.

    Raises:
        DataError: the reference cannot be compared.
        ConfigError: the user's function raises, or returns neither a boolean nor a share.
    """
    try:
        return share(judge.score(prompt, completion, reference, row))
    except UnfitReference as error:
        raise unfit(judge, where, error) from error
    except MissingDependencyError:
        raise
    except Exception as error:  # the user's function may raise anything
        what = str(error) if isinstance(error, ValueError) and str(error).startswith("returned ") else _raised(error)
        raise ConfigError(
            f"--metric {judge.name} {what}, at {where}, completion {completion[:80]!r}; mend it, and "
            "go on with --resume"
        ) from error


def unfit(judge: Judge, where: str, error: UnfitReference) -> DataError:
    """The error for a reference that a judge cannot compare."""
    return DataError(
        f"{where}: the reference {error}, so --metric {judge.name} cannot judge it; choose another metric, or leave the row out"
    )


def _raised(error: Exception) -> str:
    return f"raised {type(error).__name__}: {error}"
