"""Columns of questions and answers under other names than alpaca's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ASKED = ("instruction", "question", "query", "problem", "user_query")
GIVEN = ("input", "context")
ANSWERED = ("output", "answer", "response", "solution", "chatgpt_response")
MEANINGS = {"instruction": ASKED, "input": GIVEN, "output": ANSWERED}


def renamed_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """The user's names -> alpaca's, where exactly one column asks and one answers, in text; else nothing.

    Example:
        >>> renamed_columns({"question": "2 + 2?", "answer": "4", "id": 7})
        {'question': 'instruction', 'answer': 'output'}
        >>> renamed_columns({"question": "2 + 2?", "answer": "4", "response": "four"})
        {}
    """
    found = {ours: [name for name in row if name.lower() in names] for ours, names in MEANINGS.items()}
    if len(found["instruction"]) != 1 or len(found["output"]) != 1 or len(found["input"]) > 1:
        return {}
    names = {theirs[0]: ours for ours, theirs in found.items() if theirs}
    if not all(isinstance(row[name], str) for name in names):
        return {}
    return {theirs: ours for theirs, ours in names.items() if theirs != ours}


def rename(row: Any, names: Mapping[str, str]) -> Any:
    """The row with other names, in their order."""
    return {names.get(key, key): value for key, value in row.items()} if isinstance(row, dict) else row


def with_roles(row: Any, made: Mapping[str, Any]) -> Any:
    """A row as it stands in its file, with the roles of its messages as they were read.

    Args:
        made: the row as training takes it.

    Example:
        >>> asked = {"messages": [{"role": "human", "content": "Hi"}], "id": 7}
        >>> with_roles(asked, {"messages": [{"role": "user", "content": "Hi"}], "id": 7})
        {'messages': [{'role': 'user', 'content': 'Hi'}], 'id': 7}
    """
    if not isinstance(row, dict):
        return row
    found = {name: _renamed(row[name], made.get(name)) for name in ("messages", "prompt", "completion") if name in row}
    return {**row, **found}


def _renamed(messages: Any, read: Any) -> Any:
    if not isinstance(messages, list) or not isinstance(read, list) or len(read) < len(messages):
        return messages
    # a system prompt of another column may stand before them
    pairs = zip(messages, read[len(read) - len(messages) :], strict=True)
    return [{**one, "role": other["role"]} if _is_same(one, other) else one for one, other in pairs]


def _is_same(message: Any, read: Any) -> bool:
    """Whether both are one message, apart from the role's name; a turn that became a call is another."""
    both = isinstance(message, dict) and isinstance(read, dict) and isinstance(message.get("role"), str)
    return both and {**read, "role": message["role"]} == message
