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
