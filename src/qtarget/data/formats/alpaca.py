"""Alpaca: ``instruction``, ``input``, ``output``; LLaMA-Factory's ``system`` and ``history`` beside them."""

from __future__ import annotations

from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import kind_of
from qtarget.data.formats.messages import Said
from qtarget.data.formats.shape import ReadOptions, Row, Shape, present, with_system


def detect(row: Row) -> bool:
    """Whether a row has an instruction and an output."""
    return present(row, "instruction", "output")


def read(row: Row, options: ReadOptions, said: Said) -> Row:
    """One turn: what is asked is the prompt, the answer the completion; earlier turns are context.

    Raises:
        DataError: a value is no text, or history is no list of pairs.

    Example:
        >>> row = {"instruction": "Translate to French", "input": "cat", "output": "chat"}
        >>> read(row, ReadOptions(), set())["prompt"]
        [{'role': 'user', 'content': 'Translate to French\\ncat'}]
    """
    for name in ("instruction", "input", "output"):
        if not isinstance(row.get(name, ""), str | None):
            raise DataError(f"column {name!r} is {kind_of(row[name])}; expected text")
    asked = "\n".join(text for text in (row["instruction"], row.get("input")) if text)
    prompt = [*_history(row.get("history"), said), {"role": "user", "content": asked}]
    prompt = with_system(prompt, row.get("system"), said)
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": row["output"]}]}


def _history(value: Any, said: Said) -> list[dict[str, str]]:
    if value is None or value == []:
        return []
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(p, list | tuple) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise DataError("column 'history' is no list of pairs of texts, [[asked, answered], ...]")
    said.add("`history` -> earlier turns of the prompt, which are not trained")
    turns = (
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    return list(turns)


ALPACA = Shape(
    "alpaca",
    ("instruction", "output"),
    "instruction and input -> prompt (a user turn), output -> completion",
    frozenset({"instruction", "input", "output", "system", "history"}),
    detect,
    read,
)
