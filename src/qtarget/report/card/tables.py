"""Tables of a card: what evaluations of a run, and comparisons of its target with others, found."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qtarget.core.errors import DataError, counted

EVALUATION, COMPARISON = "qtarget evaluation", "qtarget comparison"
COMPARED = "-compare"
"""`qtarget compare` writes beside ``output_dir``, with this at the end of its name."""


def is_hub_name(name: str) -> bool:
    """Whether a name is of the hub, ``user/name``, and of no folder here.

    Example:
        >>> is_hub_name("Qwen/Qwen3-0.6B"), is_hub_name("../models/base"), is_hub_name("")
        (True, False, False)
    """
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and not os.path.exists(name)


def public(name: str) -> str:
    """A name that says nothing of this machine: a hub's name as it is, of a path the last part."""
    return name if is_hub_name(name) else Path(name).name or name


def find_evaluations(run: str | Path) -> list[Path]:
    """Evaluations of this run that lie in its folder or beside it, and the comparison made with its config."""
    folder = Path(run).resolve()
    places = [*sorted(folder.glob("*.json")), *sorted(folder.parent.glob("*.json"))]
    compared = folder.with_name(folder.name + COMPARED) / "comparison.json"
    found = [path for path in places if _names_run(path, folder)]
    return [*found, *([compared] if compared.is_file() else [])]


def _names_run(path: Path, folder: Path) -> bool:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("kind") == EVALUATION and bool(_mine(document, folder))


def _mine(document: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of the contenders that are this run, or one of its checkpoints."""
    here = folder.resolve()
    places = ((one["name"], Path(str(one["model"])).resolve()) for one in document["contenders"])
    return [name for name, place in places if place == here or here in place.parents]


def tables(path: Path, folder: Path, target: str) -> list[dict[str, Any]]:
    """The tables of one file: title, finding, columns, and a line a model; ``results`` holds this run's numbers for the hub.

    Args:
        path: JSON of ``qtarget evaluate`` or ``qtarget compare``.
        folder: of the run.
        target: of the run, which marks its line in a comparison.

    Raises:
        DataError: it is neither, or this run is not in it.
    """
    document = read_object(path)
    try:
        if document.get("kind") == EVALUATION:
            return _evaluation(document, path, folder)
        if document.get("kind") == COMPARISON:
            return [_comparison(document, target)]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} lacks {error}; was it written by another version of qtarget?") from error
    raise DataError(f"{path} is no evaluation; expected the JSON that `qtarget evaluate` or `qtarget compare` writes")


def _evaluation(document: Mapping[str, Any], path: Path, folder: Path) -> list[dict[str, Any]]:
    """For each set of rows a line a model."""
    mine = _mine(document, folder)
    if not mine:
        names = ", ".join(str(one["name"]) for one in document["contenders"])
        raise DataError(
            f"{path} does not evaluate {folder}; its models are {names}: evaluate the run, or name another file"
        )
    return [_set_table(document, name, about, mine) for name, about in document["sets"].items()]


def _set_table(document: Mapping[str, Any], name: str, about: Mapping[str, Any], mine: list[str]) -> dict[str, Any]:
    metric = str(about["metric"] or "completed")
    found = [(one["name"], one["sets"][name]) for one in document["contenders"]]
    title = "Other rows, for what was forgotten" if name == "forgetting" else "Evaluation"
    return {
        "title": f"{title}: {about['file']}, {counted(about['rows'], 'row')} (`{about['fingerprint']}`)",
        "finding": document["finding"] if name == "data" else None,
        "columns": [f"right answers ({metric})", "nll, nats a token"],
        "lines": [
            {"name": public(str(one)), "mine": one in mine, "cells": [interval(at["completion"]), interval(at["nll"])]}
            for one, at in found
        ],
        "foot": "95 % intervals over rows.",
        "results": [
            (str(about["file"]), kind, at[part]["mean"])
            for one, at in found if one in mine
            for part, kind in (("completion", metric), ("nll", "nll")) if at[part]
        ],
    }  # fmt: skip


def _comparison(document: Mapping[str, Any], target: str) -> dict[str, Any]:
    """A line a contender, after the untrained base; levels of likelihood are nats, lower is better."""
    about, baseline = document["sets"]["data"], document["baseline"]
    sign = -1 if about["metric"] == "nll" else 1
    lines = [("untrained", document["base"]), *((one["name"], one) for one in document["contenders"])]
    return {
        "title": f"Compared with other targets: {about['file']}, {counted(about['rows'], 'row')}, "
        f"{counted(document['measure']['seeds'], 'seed')}",
        "finding": document["finding"],
        "columns": [f"{about['metric']}, mean over seeds", f"better than {baseline} by"],
        "lines": [
            {"name": public(str(name)), "mine": name == target,
             "cells": [f"{sign * one['level']:.3f}", interval(one["to_baseline"])]}
            for name, one in lines
        ],
        "foot": "95 % intervals. Each contender had the same rows, steps and choice of rates.",
        "results": [],
    }  # fmt: skip


def interval(found: Mapping[str, float] | None) -> str:
    """A mean and its interval, or nothing.

    Example:
        >>> interval({"mean": 0.5, "low": 0.4, "high": 0.6}), interval(None)
        ('0.500 (0.400 .. 0.600)', '')
    """
    return f"{found['mean']:.3f} ({found['low']:.3f} .. {found['high']:.3f})" if found else ""


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; expected the output_dir of `qtarget train`") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); was it cut off?") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value
