"""Rows that choose a learning rate never judge what was chosen by them: two halves, each tuned on the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.storage.files import digest

PROMPT = ("prompt", "text", "input_ids")


def prompt_groups(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """A number a row, equal for rows of one prompt; of messages the prompt is all before the last.

    Example:
        >>> prompt_groups([{"prompt": "a", "completion": "1"}, {"prompt": "b"}, {"prompt": "a", "completion": "2"}])
        [0, 1, 0]
    """
    known: dict[str, int] = {}
    return [known.setdefault(_prompt(row), len(known)) for row in rows]


def _prompt(row: Mapping[str, Any]) -> str:
    if row.get("messages"):
        return json.dumps(row["messages"][:-1], sort_keys=True, default=str)
    return json.dumps(next((row[name] for name in PROMPT if row.get(name) is not None), None), default=str)


def halves(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """0 or 1 a row: by prompt, so that duplicates stay together, and the same whatever the order of the rows.

    Example:
        >>> parts = halves([{"prompt": p} for p in "abca"])
        >>> sorted(parts[:3]) in ([0, 0, 1], [0, 1, 1]), parts[0] == parts[3]
        (True, True)
    """
    names = [_prompt(row) for row in rows]
    ordered = sorted(set(names), key=lambda name: digest(name.encode("utf-8", "surrogatepass")))
    part = {name: i % 2 for i, name in enumerate(ordered)}
    return [part[name] for name in names]
