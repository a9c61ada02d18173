"""What to do with a row of no usable shape."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from qtarget.data.formats.shape import Row

# Names other projects use, too far from ours in spelling for difflib.
OTHER_NAMES = {
    "question": "prompt",
    "query": "prompt",
    "input": "prompt",
    "answer": "completion",
    "output": "completion",
    "response": "completion",
    "chosen": "completion",
    "conversation": "messages",
    "chat": "messages",
    "dialog": "messages",
    "content": "text",
    "tokens": "input_ids",
}
HALVES = {"prompt": "completion", "completion": "prompt", "instruction": "output", "output": "instruction"}
"""Columns that need each other."""


def hint(row: Row, known: Sequence[str]) -> str:
    """The next step for a row whose columns make no shape; empty where none is known.

    Args:
        known: columns of all shapes.

    Example:
        >>> hint({"question": "2 + 2?", "response": "4"}, ["prompt", "completion"])
        " Next: rename 'question' to 'prompt'; rename 'response' to 'completion'."
    """
    if set(row) >= {"role", "content"}:
        return ' Next: these are single messages; put each conversation into one row, {"messages": [...]}.'
    if words := empty(row, known) or _half(row):
        return words
    hints: list[str] = []
    for name in row:
        if name in known:
            continue
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
        meant = OTHER_NAMES.get(name.lower()) or (near[0] if near else "")
        if meant in known and row.get(meant) is None:
            hints.append(f"rename {name!r} to {meant!r}")
    return f" Next: {'; '.join(hints)}." if hints else ""


def empty(row: Row, known: Iterable[str]) -> str:
    """The advice for a row whose columns are the right ones, and which has nothing in one of them."""
    names = ", ".join(repr(name) for name in dict.fromkeys(known) if name in row and row[name] is None)
    return f" Next: {names} is there but holds no value: fill it in, or remove the row." if names else ""


def _half(row: Row) -> str:
    """The advice for a row with one half of a pair: the column that may be the other half, or that there is none."""
    here = next((name for name in HALVES if name in row), None)
    if here is None:
        return ""
    there = HALVES[here]
    meaning = "completion" if there in ("completion", "output") else "prompt"
    for name in row:
        alike = difflib.get_close_matches(name.lower(), [there], cutoff=0.7)
        # alpaca's input is a part of what is asked
        if alike or (OTHER_NAMES.get(name.lower()) == meaning and name != "input"):
            sampled = here == "prompt" and not alike
            other = ", or let the model answer: `qtarget rl` takes these rows as they are (docs/rl.md)" * sampled
            return f" Next: rename {name!r} to {there!r}{other}."
    if meaning == "prompt":
        return f" Next: the row has {here!r} without what it answers: add {there!r}, or remove the row."
    return (
        f" Next: the row has {here!r} without an answer: add {there!r}, or remove the row; `qtarget rl` takes prompts alone"
        f"{'' if here == 'prompt' else ', in a column `prompt`'}, and the model answers (docs/rl.md)."
    )
