"""TRL's own shapes: token ids, prompt and completion, messages, text."""

from __future__ import annotations

import json
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import excerpt, kind_of
from qtarget.data.formats.messages import Said, read_messages
from qtarget.data.formats.shape import ReadOptions, Row, Shape, present, with_system


def check_kind(row: Row, name: str, good: bool, expected: str) -> None:
    """Raise where a column holds another kind of value.

    Raises:
        DataError: it does.
    """
    if good:
        return
    value = row[name]
    hint = "; tables hold text only, use .jsonl" if isinstance(value, str) and value.lstrip()[:1] == "[" else ""
    raise DataError(
        f"column {name!r} is {kind_of(value)} {excerpt(json.dumps(value, default=str))}; expected {expected}{hint}"
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and -(2**63) <= i < 2**63 for i in value)


def _tokens(row: Row, options: ReadOptions, said: Said) -> Row:
    names = ("input_ids", "labels") if row.get("labels") is not None else ("input_ids",)
    for name in names:
        check_kind(row, name, _is_ids(row[name]), "a list of token ids (integers of at most 64 bits)")
    if len(names) == 2 and len(row["input_ids"]) != len(row["labels"]):
        raise DataError(
            f"{len(row['labels'])} labels for {len(row['input_ids'])} input_ids; give one label a token, -100 where it "
            "is not trained on"
        )
    return {name: row[name] for name in names}


def _pair(row: Row, options: ReadOptions, said: Said) -> Row:
    expected = "text, or a list of messages with role and content"
    for name in ("prompt", "completion"):
        check_kind(row, name, isinstance(row[name], str | list), expected)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            f"prompt is {kind_of(prompt)} and completion {kind_of(completion)}; make both text, or both lists of messages"
        )
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    asked = with_system(read_messages(prompt, "prompt", said, options.roles), row.get("system"), said)
    return {"prompt": asked, "completion": read_messages(completion, "completion", said, options.roles)}


def _messages(row: Row, options: ReadOptions, said: Said) -> Row:
    messages = read_messages(row["messages"], "messages", said, options.roles)
    return {"messages": with_system(messages, row.get("system"), said)}


def text_shape(name: str) -> Shape:
    """The shape of rows with a text column of this name."""

    def read(row: Row, options: ReadOptions, said: Said) -> Row:
        check_kind(row, name, isinstance(row[name], str), "text")
        return {name: row[name]}

    return Shape("text", (name,), "", frozenset({name}), lambda row: present(row, name), read)


LABELLED = Shape(
    "token ids", ("input_ids", "labels"), "", frozenset({"input_ids", "labels"}),
    lambda row: present(row, "input_ids", "labels"), _tokens,
)  # fmt: skip
TOKENS = Shape(
    "token ids", ("input_ids",), "", frozenset({"input_ids"}), lambda row: present(row, "input_ids"), _tokens
)
PAIR = Shape(
    "prompt and completion", ("prompt", "completion"), "", frozenset({"prompt", "completion"}),
    lambda row: present(row, "prompt", "completion"), _pair,
)  # fmt: skip
MESSAGES = Shape(
    "messages", ("messages",), "", frozenset({"messages"}), lambda row: present(row, "messages"), _messages
)
