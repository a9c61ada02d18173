"""Messages as OpenAI writes them, made into what chat templates read: text, roles they know, calls as objects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import excerpt, kind_of

Message = dict[str, Any]
Said = set[str]
"""What was changed in a row, in words; it is announced with the number of rows."""

ROLES = ("system", "user", "assistant", "tool", "developer")
CERTAIN_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
"""Names of other projects that can mean one thing alone."""
CALL_ROLES = ("function_call", "tool_call")
"""LLaMA-Factory's and ms-swift's turns whose text is a call."""
TEXT_PARTS = ("text", "input_text", "output_text")


class NullContentError(DataError):
    """A message says nothing: its content is null or missing, and it calls no tool."""


def read_messages(value: Any, column: str, said: Said, roles: Mapping[str, str] | None = None) -> list[Message]:
    """A conversation in TRL's form: ``role``, ``content`` as text, ``tool_calls`` with arguments as objects.

    Args:
        value: a list of messages, with ``role`` and ``content`` or ShareGPT's ``from`` and ``value``.
        column: its name, for messages about it.
        said: what was changed is added here.
        roles: the user's own names for roles: theirs -> the template's.

    Raises:
        NullContentError: a message without content and without a call.
        DataError: an unknown role, a part that is no text, a call without name, arguments that are no object.

    Example:
        >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "messages", set())
        [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        said.add(f"`{column}` as JSON text -> a list of messages")
        value = json_value(value, f"column {column!r}")
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} is {_shown(value)}; expected {EXPECTED}")
    messages = [_message(message, f"{column}[{i}]", said, roles or {}) for i, message in enumerate(value)]
    found = {message["role"] for message in messages}
    if "developer" in found and "system" not in found and "developer" not in (roles or {}):
        said.add("role developer -> system")
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
    return messages


EXPECTED = 'a list of {"role": ..., "content": ...}'


def _shown(value: Any) -> str:
    return f"{kind_of(value)} {excerpt(json.dumps(value, default=str, ensure_ascii=False))}"


def _message(value: Any, where: str, said: Said, roles: Mapping[str, str]) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {_shown(value)}; expected an object with role and content")
    message = {key: item for key, item in value.items() if item is not None or key == "content"}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and message.get(ours) is None:
            message = {ours if key == theirs else key: item for key, item in message.items() if key != ours}
        elif theirs in message:  # TRL would overwrite one with the other
            raise DataError(f"{where} has both {ours!r} and {theirs!r}; keep one of them")
    name = message.get("role")
    if not isinstance(name, str):
        raise DataError(f"{where} has no role; expected {EXPECTED}")
    if name in CALL_ROLES and name not in roles:
        return _call_turn(message, where, said)
    message["role"] = _role(name, where, said, roles)
    calls = _calls(message, where, said)
    message.pop("function_call", None)
    message.pop("tool_calls", None)
    if message.get("content") is None and isinstance(message.get("refusal"), str):
        said.add("`refusal` -> content")
        message["content"] = message["refusal"]
    message.pop("refusal", None)
    if "content" in message or not calls:
        message["content"] = _content(message, where, bool(calls), said)
    return message | ({"tool_calls": calls} if calls else {})


def _role(name: str, where: str, said: Said, roles: Mapping[str, str]) -> str:
    if name in roles:
        if roles[name] != name:
            said.add(f"role {name} -> {roles[name]}")
        return roles[name]
    low = name.strip().lower()
    mapped = low if low in ROLES else CERTAIN_ROLES.get(low)
    if not low:
        raise DataError(f"{where} has an empty role; expected one of {', '.join(ROLES)}")
    if mapped is None:
        raise DataError(
            f"{where} has the role {name!r}, expected one of {', '.join(ROLES)}; rename it, or say what it is with "
            f"`roles: {{{name}: user}}` (a template that knows it: `roles: {{{name}: {name}}}`)"
        )
    if mapped != name:
        said.add(f"role {name} -> {mapped}")
    return mapped


def _content(message: Message, where: str, calls: bool, said: Said) -> Any:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:
        if calls:
            return None
        raise NullContentError(
            f"{where} ({message['role']}) has no content ({'null' if 'content' in message else 'the key is missing'}) "
            "and calls no tool; remove the row, write its text, or leave such rows out with the config's `null_content: drop`"
        )
    if message["role"] == "tool" and not _is_parts(content):
        if isinstance(content, dict | list):
            said.add("tool output that is an object -> JSON text")
            return json.dumps(content, ensure_ascii=False)
    elif isinstance(content, list):
        said.add("content parts -> their text")
        text = parts_text(content, where)
        if not content and not calls:
            raise NullContentError(
                f"{where} ({message['role']}) has no content (an empty list) and calls no tool; remove the row, or "
                "leave such rows out with the config's `null_content: drop`"
            )
        return text
    raise DataError(f"{where} ({message['role']}): content is {_shown(content)}; expected text")


def _is_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content
    )


def parts_text(parts: list[Any], where: str) -> str:
    """The text of content parts, one after the other.

    Raises:
        DataError: a part that is no text (an image, audio, a file), by its type.

    Example:
        >>> parts_text([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "messages[0]")
        'ab'
    """
    out = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            out.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
            shown = f"a part of type {kind!r}" if kind is not None else f"a part that is {_shown(part)}"
            raise DataError(
                f"{where}: part {i} of its content is {shown}; rows of text are trained here, so remove the part, or "
                "put into words what it shows"
            )
        out.append(text)
    return "".join(out)


def _calls(message: Message, where: str, said: Said) -> list[Any]:
    """``tool_calls`` in OpenAI's present form."""
    calls = message.get("tool_calls")
    if isinstance(calls, str):
        calls = json_value(calls, f"{where}.tool_calls") if calls.strip() else []
        said.add("`tool_calls` as JSON text -> objects")
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"{where}: tool_calls is {_shown(calls)}; expected a list of calls")
    if message.get("function_call"):
        said.add("`function_call` -> `tool_calls`")
        calls = [*(calls or []), {"type": "function", "function": message["function_call"]}]
    return [call(item, f"{where}.tool_calls[{i}]", said) for i, item in enumerate(calls or [])]


def call(value: Any, where: str, said: Said) -> Message:
    """One tool call, its arguments an object.

    Raises:
        DataError: no name, or arguments that are no object.

    Example:
        >>> call({"function": {"name": "rain", "arguments": '{"city": "Oslo"}'}}, "here", set())
        {'type': 'function', 'function': {'name': 'rain', 'arguments': {'city': 'Oslo'}}}
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is {_shown(value)}; expected a call with name and arguments")
    whole = {key: item for key, item in value.items() if item is not None}
    if "function" not in whole and "name" in whole:
        said.add("calls without `function` around name and arguments -> OpenAI's form")
        inner = {key: item for key, item in whole.items() if key in ("name", "arguments", "parameters")}
        whole = {key: item for key, item in whole.items() if key not in inner and key != "type"}
        whole["function"] = inner
    function = whole.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise DataError(f"{where} has no function name: {_shown(value)}; expected name and arguments")
    function = dict(function)
    if "arguments" not in function and "parameters" in function:
        function["arguments"] = function.pop("parameters")
    function["arguments"] = _arguments(function.get("arguments"), where, said)
    kind = whole.get("type", "function")
    if kind != "function":
        raise DataError(f"{where} is a call of type {kind!r}; expected 'function'")
    first = {"id": whole["id"]} if "id" in whole else {}
    rest = {key: item for key, item in whole.items() if key not in ("id", "type", "function")}
    return first | {"type": "function", "function": function} | rest


def _arguments(value: Any, where: str, said: Said) -> dict[str, Any]:
    if value is None or value == "":
        said.add("calls without arguments -> {}")
        return {}
    if isinstance(value, str):
        said.add("arguments as JSON text -> objects")
        value = json_value(value, f"{where}: arguments")
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: arguments are {_shown(value)}; expected an object, name to value")
    return dict(value)


def _call_turn(message: Message, where: str, said: Said) -> Message:
    """LLaMA-Factory's turn ``function_call``: the text is one call or a list of them."""
    role, content = message["role"], message.get("content")
    said.add(f"role {role} -> assistant with `tool_calls`")
    value = json_value(content, f"{where}: the text of a {role} turn") if isinstance(content, str) else content
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise DataError(f"{where} is a {role} turn without a call; expected name and arguments")
    quiet: Said = set()  # that the text becomes an object is said above
    made = [call(item, f"{where}.tool_calls[{i}]", quiet) for i, item in enumerate(calls)]
    rest = {key: item for key, item in message.items() if key not in ("role", "content")}
    return {"role": "assistant", "content": "", "tool_calls": made} | rest


def json_value(text: str, what: str) -> Any:
    """A JSON text's value.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {excerpt(text)!r} is not JSON ({error}); mend it, or remove the row") from error
