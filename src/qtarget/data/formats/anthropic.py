"""Anthropic's message logs: blocks of content, tool results inside user turns, ``system`` at the top."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import kind_of
from qtarget.data.formats.messages import Message, Said, parts_text, read_messages
from qtarget.data.formats.shape import ReadOptions, Row, Shape, with_system

MARKS = ("tool_use", "tool_result", "thinking", "redacted_thinking", "server_tool_use")


def detect(row: Row) -> bool:
    """Whether a message holds a block that only Anthropic writes, or a tool has an ``input_schema``."""
    messages, tools = row.get("messages"), row.get("tools")
    if not isinstance(messages, list):
        return False
    contents = (m.get("content") for m in messages if isinstance(m, Mapping))
    blocks = (block for content in contents if isinstance(content, list) for block in content)
    kinds = (block.get("type") for block in blocks if isinstance(block, Mapping))
    schemas = isinstance(tools, list) and any(isinstance(t, Mapping) and t.get("input_schema") for t in tools)
    return schemas or any(kind in MARKS for kind in kinds)


def read(row: Row, options: ReadOptions, said: Said) -> Row:
    """``tool_use`` becomes a call of the assistant, ``tool_result`` a message of its own, ``thinking`` reasoning_content.

    Raises:
        DataError: a block that cannot be read, by its type.

    Example:
        >>> use = {"type": "tool_use", "id": "t1", "name": "rain", "input": {"city": "Oslo"}}
        >>> row = {"messages": [{"role": "assistant", "content": [use]}]}
        >>> read(row, ReadOptions(), set())["messages"][0]["tool_calls"][0]["function"]
        {'name': 'rain', 'arguments': {'city': 'Oslo'}}
    """
    names: dict[str, str] = {}
    messages: list[Any] = []
    for i, message in enumerate(row["messages"]):
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            messages += _split(dict(message), f"messages[{i}]", names, said)
        else:
            messages.append(message)
    return {"messages": with_system(read_messages(messages, "messages", said, options.roles), row.get("system"), said)}


def _split(message: Message, where: str, names: dict[str, str], said: Said) -> list[Message]:
    """The messages that one with blocks stands for, in order."""
    blocks = message.pop("content")
    out: list[Message] = []
    texts: list[Any] = []
    calls: list[Message] = []
    thoughts: list[str] = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_use":
            names[str(block.get("id"))] = str(block.get("name"))
            calls.append(_call(block))
        elif kind == "tool_result":
            if texts:
                out.append(message | {"content": parts_text(texts, where)})
                texts = []
            out.append(_result(block, where, names))
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "redacted_thinking":
            said.add("`redacted_thinking` blocks are left out")
        elif calls:
            raise DataError(f"{where}: a {kind} block follows a tool_use block; a template writes calls last")
        else:
            texts.append(block)
    if calls:
        said.add("`tool_use` blocks -> `tool_calls`")
    if len(out):
        said.add("`tool_result` blocks -> messages with role tool")
    if thoughts:
        said.add("`thinking` blocks -> `reasoning_content`")
    if texts or calls or thoughts or not out:
        rest = {"content": parts_text(texts, where) if texts or calls else None}
        rest |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
        out.append(message | rest | ({"tool_calls": calls} if calls else {}))
    return out


def _call(block: Mapping[str, Any]) -> Message:
    called = {"type": "function", "function": {"name": block.get("name"), "arguments": block.get("input")}}
    return ({"id": block["id"]} if block.get("id") else {}) | called


def _result(block: Mapping[str, Any], where: str, names: Mapping[str, str]) -> Message:
    content = block.get("content")
    if isinstance(content, list):
        content = parts_text(content, f"{where}, a tool_result")
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise DataError(f"{where}: a tool_result holds {kind_of(content)} {json.dumps(content)}; expected text")
    identity = block.get("tool_use_id")
    known = {"tool_call_id": identity} if isinstance(identity, str) else {}
    known |= {"name": names[str(identity)]} if identity in names else {}
    return {"role": "tool", **known, "content": content}


ANTHROPIC = Shape(
    "anthropic",
    ("messages",),
    "blocks -> messages with tool_calls and tool results of their own, system -> a first message",
    frozenset({"messages", "system"}),
    detect,
    read,
)
