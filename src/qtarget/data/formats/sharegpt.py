"""ShareGPT: ``conversations`` of ``from`` and ``value``; LLaMA-Factory's ``system`` and ``tools`` beside them."""

from __future__ import annotations

from qtarget.data.formats.messages import Said, read_messages
from qtarget.data.formats.shape import ReadOptions, Row, Shape, present, with_system


def detect(row: Row) -> bool:
    """Whether a row has conversations."""
    return present(row, "conversations")


def read(row: Row, options: ReadOptions, said: Said) -> Row:
    """The conversation as ``messages``, as TRL reads it.

    Raises:
        DataError: as ``read_messages``.

    Example:
        >>> row = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
        >>> read(row, ReadOptions(), set())
        {'messages': [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': 'Hi'}]}
    """
    messages = read_messages(row["conversations"], "conversations", said, options.roles)
    return {"messages": with_system(messages, row.get("system"), said)}


SHAREGPT = Shape(
    "sharegpt", ("conversations",), "conversations -> messages", frozenset({"conversations", "system"}), detect, read
)
