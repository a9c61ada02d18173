"""OpenViking's session archives (``messages.jsonl``): a line is a message, a call and its result are one part."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import kind_of
from qtarget.data.formats.messages import Message, Said
from qtarget.data.formats.shape import ReadOptions, Row, Shape

NEVER = ("tool_transport", "checkpoint")
"""Kinds of messages that nobody wrote to be answered or learned."""
FINISHED, FAILED = "completed", "error"


def detect(row: Row) -> bool:
    """Whether a row is one message of a session."""
    if row.get("role") not in ("user", "assistant") or "messages" in row:
        return False
    own = any(name in row for name in ("created_at", "message_kind", "turn_id", "source_message_ids"))
    return isinstance(row.get("parts"), list) or (own and isinstance(row.get("content"), str))


def read_session(rows: Iterable[tuple[str, Row]], said: Counter[str]) -> list[Message]:
    """The messages of one session, calls and results split.

    Steps whose tool failed, or never answered, get ``weight: 0``, and so do tool results: nothing of them is trained.
    Messages of the kinds ``tool_transport`` and ``checkpoint`` are left out.

    Args:
        rows: place and line.
        said: counts of what was changed and left out.

    Raises:
        DataError: a part that is no text (an image), by its line and type.
    """
    lines = list(rows)
    outputs = _transported(row for _, row in lines)
    messages: list[Message] = []
    for place, row in lines:
        if not detect(row):
            raise DataError(f"{place}: not a message of a session (role and parts), as the lines above are")
        kind = row.get("message_kind")
        if kind in NEVER:
            said[f"messages of kind {kind} are left out"] += 1
            continue
        parts = row.get("parts")
        if not isinstance(parts, list):
            parts = [{"type": "text", "text": row["content"]}]
        try:
            messages += _split(str(row["role"]), parts, outputs, said)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    return messages


def _transported(rows: Iterable[Row]) -> dict[str, Mapping[str, Any]]:
    """Tool parts of transport messages by their id: the results of calls that carry none."""
    parts = (p for row in rows if row.get("message_kind") == "tool_transport" for p in row.get("parts") or [])
    return {str(p["tool_id"]): p for p in parts if isinstance(p, Mapping) and p.get("tool_id") and p.get("tool_output")}


def _split(role: str, parts: list[Any], outputs: Mapping[str, Mapping[str, Any]], said: Counter[str]) -> list[Message]:
    out: list[Message] = []
    texts: list[str] = []
    tools: list[Mapping[str, Any]] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if tools:  # a text after results is the next step
                out += _step("".join(texts), tools, outputs, said)
                texts, tools = [], []
            texts.append(part["text"])
        elif kind == "context":
            said[
                "`context` parts were shown to the model, their text is not in the archive: the prompt is not whole"
            ] += 1
        elif kind == "tool":
            if role != "assistant":
                raise DataError(f"a tool part in a message of role {role!r}; expected it in the assistant's")
            tools.append(part)
        else:
            raise DataError(f"a part of type {kind!r}; rows of text are trained here, so leave this session out")
    if tools:
        return out + _step("".join(texts), tools, outputs, said)
    if texts:
        return [*out, {"role": role, "content": "".join(texts)}]
    if not out:
        said["messages without text or tool are left out"] += 1
    return out


def _step(
    text: str, tools: list[Mapping[str, Any]], outputs: Mapping[str, Mapping[str, Any]], said: Counter[str]
) -> list[Message]:
    """An assistant's message with its calls, and a message a result."""
    statuses = [str(part.get("tool_status") or FINISHED) for part in tools]
    said["tool parts -> a call of the assistant and a message with role tool (weight 0)"] += len(tools)
    step: Message = {"role": "assistant", "content": text, "tool_calls": [_call(part) for part in tools]}
    if any(status != FINISHED for status in statuses):
        unfinished = "failed" if FAILED in statuses else "never ended"
        said[f"steps whose tool {unfinished} get weight 0"] += 1
        step["weight"] = 0
    results = [_result(part, outputs, said) for part in tools]
    return [step, *(result for result in results if result is not None)]


def _call(part: Mapping[str, Any]) -> Message:
    name, given = part.get("tool_name"), part.get("tool_input")
    if not isinstance(name, str) or not name:
        raise DataError("a tool part without tool_name")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else {}
        except ValueError as error:
            raise DataError(f"tool_input of {name} is text that is not JSON ({error})") from error
    if given is not None and not isinstance(given, Mapping):
        raise DataError(f"tool_input of {name} is {kind_of(given)}; expected an object")
    called = {"type": "function", "function": {"name": name, "arguments": dict(given or {})}}
    return ({"id": str(part["tool_id"])} if part.get("tool_id") else {}) | called


def _result(part: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]], said: Counter[str]) -> Message | None:
    identity = str(part.get("tool_id") or "")
    source = part if part.get("tool_output") else outputs.get(identity, part)
    output = source.get("tool_output")
    if output is None and part.get("tool_status") not in (FINISHED, FAILED, None):
        return None
    if source.get("tool_output_truncated"):
        said["tool outputs were cut by the archive (previews)"] += 1
    text = output if isinstance(output, str) else "" if output is None else json.dumps(output, ensure_ascii=False)
    named = {"tool_call_id": identity} if identity else {}
    return {"role": "tool", **named, "name": str(part.get("tool_name")), "content": text, "weight": 0}


def _as_row(row: Row, options: ReadOptions, said: Said) -> Row:
    raise AssertionError("a session is read whole: see read_session")


OPENVIKING = Shape(
    "openviking", ("role", "parts"), "each file is one session -> one row of messages", frozenset(), detect, _as_row
)
