"""Tool schemas in OpenAI's form, which chat templates read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.files import kind_of
from qtarget.data.formats.messages import Said, json_value


def read_tools(value: Any, said: Said) -> list[dict[str, Any]]:
    """A row's tools; an empty list where it has none.

    Args:
        value: a list of schemas, or the same as JSON text; null, an empty text and an empty list are no tools. Schemas
            without ``type`` and ``function`` around them, and Anthropic's ``input_schema``, get OpenAI's form.
        said: what was changed is added here.

    Raises:
        DataError: no JSON, no list, or an entry without a name.

    Example:
        >>> read_tools("", set()), read_tools("[]", set())
        ([], [])
        >>> read_tools([{"name": "rain", "input_schema": {"type": "object"}}], set())
        [{'type': 'function', 'function': {'name': 'rain', 'parameters': {'type': 'object'}}}]
    """
    if isinstance(value, str):
        value = json_value(value, "column 'tools'") if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"column 'tools' is {kind_of(value)}; expected a list of tool schemas, or its JSON text")
    return [_tool(item, i, said) for i, item in enumerate(value)]


def read_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's ``chat_template_kwargs`` as an object, under its name; nothing where it has none.

    Raises:
        DataError: it is no object, nor the JSON text of one.

    Example:
        >>> read_kwargs({"chat_template_kwargs": '{"enable_thinking": false}'}), read_kwargs({"chat_template_kwargs": None})
        ({'chat_template_kwargs': {'enable_thinking': False}}, {})
    """
    name = "chat_template_kwargs"
    value = row.get(name)
    if isinstance(value, str):
        value = json_value(value, f"column {name!r}") if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError(f"column {name!r} is {kind_of(value)}; expected an object, name to value")
    return {name: value}


def _tool(value: Any, index: int, said: Said) -> dict[str, Any]:
    if isinstance(value, str):
        value = json_value(value, f"tools[{index}]")
    if not isinstance(value, Mapping):
        raise DataError(f"tools[{index}] is {kind_of(value)}; expected a schema with name and parameters")
    function = value.get("function")
    if isinstance(function, Mapping):
        if not isinstance(function.get("name"), str):
            raise DataError(f"tools[{index}] has no function name; expected a schema with name and parameters")
        return dict(value) if "type" in value else {"type": "function", **value}
    if not isinstance(value.get("name"), str):
        kind = f" (type {value['type']!r})" if "type" in value else ""
        raise DataError(f"tools[{index}]{kind} has no name; expected a schema with name and parameters")
    said.add("tool schemas without `function` around them -> OpenAI's form")
    left_out = ("type", "input_schema", "cache_control")
    inner = {key: item for key, item in value.items() if key not in left_out}
    if "input_schema" in value:
        inner["parameters"] = value["input_schema"]
    return {"type": "function", "function": inner}
