"""What a format is: how its rows are told, and what becomes of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import names_of
from qtarget.data.formats.messages import Message, Said, parts_text
from qtarget.data.limits import Limits

Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """One form of rows.

    Attributes:
        name: as it is announced.
        columns: those that a row of it has, for messages.
        reading: what becomes of them, in words; empty for what TRL reads as it is.
        uses: all columns that it reads; they do not stay beside what is made of them.
        detect: whether a row has this shape.
        read: the row as TRL takes it, without notes; what was changed is added to the set.
    """

    name: str
    columns: tuple[str, ...]
    reading: str
    uses: frozenset[str]
    detect: Callable[[Row], bool]
    read: Callable[[Row, ReadOptions, Said], Row]


@dataclass(frozen=True)
class ReadOptions:
    """How rows are read.

    Attributes:
        text_field: name of the text column (TRL's ``dataset_text_field``).
        format: name of a shape, or ``auto``.
        null_content: ``refuse`` a row with a message that says nothing, or ``drop`` it and count.
        roles: the user's names for roles: theirs -> the template's.
        tools: schemas for rows without their own.
        limits: how much is taken.
    """

    text_field: str = "text"
    format: str = "auto"
    null_content: str = "refuse"
    roles: Mapping[str, str] = field(default_factory=dict)
    tools: list[dict[str, Any]] = field(default_factory=list)
    limits: Limits = field(default_factory=Limits)


def with_system(messages: list[Message], system: Any, said: Said) -> list[Message]:
    """The conversation with the system prompt of another column at its head.

    Args:
        system: text, Anthropic's list of text blocks, or nothing.

    Raises:
        DataError: the conversation has another system prompt.

    Example:
        >>> with_system([{"role": "user", "content": "Hi"}], "Be short", set())[0]
        {'role': 'system', 'content': 'Be short'}
    """
    if system is None or system in ("", []):
        return messages
    if not isinstance(system, str | list):
        raise DataError(f"column 'system' is {system!r}; expected text")
    text = system if isinstance(system, str) else parts_text(system, "column 'system'")
    own = [message["content"] for message in messages if message["role"] == "system"]
    if own == [text]:
        return messages
    if own:
        raise DataError("column 'system' holds another system prompt than the conversation; keep one of them")
    said.add("column `system` -> a first message with role system")
    return [{"role": "system", "content": text}, *messages]


def present(row: Row, *names: str) -> bool:
    """Whether a row has values in all these columns."""
    return all(row.get(name) is not None for name in names)


def words(columns: tuple[str, ...]) -> str:
    """Column names in words."""
    return names_of(columns)
