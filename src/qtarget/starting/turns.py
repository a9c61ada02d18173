"""Conversations of one exchange as prompt and completion: whose tokens are trained then needs no marks of a template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PLAIN = {"role", "content"}
"""What a message may hold; another key may mean something that is only read in ``messages``."""


def parted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Each row's last message as its completion, the others as its prompt; None unless that is all that is answered in every row.

    Args:
        rows: with ``messages``; other columns stay.

    Example:
        >>> asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        >>> parted([{"messages": [asked, said], "id": 7}]) == [{"prompt": [asked], "completion": [said], "id": 7}]
        True
        >>> parted([{"messages": [asked, said, asked, said]}]) is None
        True
    """
    if not all(_is_one_exchange(row) for row in rows):
        return None
    return [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        | {name: value for name, value in row.items() if name != "messages"}
        for row in rows
    ]


def _is_one_exchange(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages") or []
    roles = [message.get("role") for message in messages]
    plain = all(set(message) <= PLAIN for message in messages) and not {"prompt", "completion"} & set(row)
    return plain and roles[-1:] == ["assistant"] and "user" in roles and roles.count("assistant") == 1
