"""Marks put into one row of each kind: does the chat template write what it is given, and does it write today's date?

A row's own words can stand in it twice (a tool's name in its schema, an argument in the question), so finding them does not
show that the template wrote them; a mark that stands nowhere else does.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

from datasets import Dataset
from transformers.utils import chat_template_utils

from qtarget.data.checks.findings import Finding
from qtarget.data.checks.rendered import ROLES, Issue, calls_of, content_texts
from qtarget.integrations.sft.data.columns import ROW
from qtarget.integrations.sft.rendering.renderer import Renderer, Row
from qtarget.integrations.sft.rendering.scan import Feature, Features, enumerate_features

MARK, NAME = "qzProbeqz", "qzNameqz"
DAYS_AHEAD = 397


def probe_template(tokens: Dataset, renderer: Renderer, features: Features) -> list[Issue]:
    """Issues of all rows with a feature, from one row that has it."""
    numbers = tokens[ROW] if features else []
    issues: list[Issue] = []
    for feature, places in features.items():
        role = feature[1]
        if role and role not in ROLES:
            issues += [Issue(numbers[i], "unknown_roles", f"role {role!r}") for i in places]
        row: Any = tokens[places[0]]
        for check, where in _probe(row, renderer, feature):
            issues += [Issue(numbers[i], check, where) for i in places]
    return issues


def _probe(row: Row, renderer: Renderer, feature: Feature) -> Iterator[tuple[str, str]]:
    """Checks that one row's feature fails, and the part concerned."""
    kind, role, _, _ = feature
    if kind == "tools":
        tools = copy.deepcopy(renderer.options(row)["tools"])
        for tool in tools:
            (tool.get("function") or tool)["name"] = NAME
        if NAME not in _text({**row, "tools": tools}, renderer, renderer.messages(row), NAME):
            yield "content_dropped", "a tool's schema"
        return
    messages = copy.deepcopy(renderer.messages(row))
    message = messages[_where(row, messages, feature)]
    if kind == "calls":
        for call in calls_of(message):
            call["name"] = NAME  # pyright: ignore[reportIndexIssue]
            marked = {MARK: MARK}
            call["arguments"] = json.dumps(marked) if isinstance(call.get("arguments"), str) else marked  # pyright: ignore[reportIndexIssue]
        text = _text(row, renderer, messages, NAME + MARK)
        if NAME not in text:
            yield "content_dropped", f"the call's name in {role}"
        if MARK not in text:
            yield "content_dropped", f"an argument of the call in {role}"
    elif kind == "content":
        message["content"] = MARK
        if MARK not in _text(row, renderer, messages, MARK):
            yield "content_dropped", f"content of {role}"
    else:
        given = _text(row, renderer, messages, "")
        message["content"] = "".join(content_texts(message["content"]))
        if given != _text(row, renderer, messages, given):
            yield "parts_changed", f"content of {role}"


def _where(row: Row, messages: list[Row], feature: Feature) -> int:
    """The first message that has the feature."""
    return next(i for i, found in enumerate_features(row, messages) if found == feature)


def _text(row: Row, renderer: Renderer, messages: list[Row], otherwise: str) -> str:
    """The rendered row; ``otherwise`` where the template takes the real row and not the marked one."""
    try:
        return renderer.text(row, messages)
    except Exception:
        return otherwise


def todays_date(tokens: Dataset, renderer: Renderer) -> list[Finding]:
    """A template that writes the date of today: tokens, and so a cache, change with it."""
    if not renderer.conversational(tokens):
        return []
    # a template may write the date only where a row has no system message
    rows: Any = [tokens[i] for i in sorted({0, len(tokens) // 2, len(tokens) - 1})]
    now = [renderer.text(row) for row in rows]
    with mock.patch.object(chat_template_utils, "datetime", _Later):
        then = [renderer.text(row) for row in rows]
    today, later = next(((a, b) for a, b in zip(now, then, strict=True) if a != b), ("", ""))
    if today == later:
        return []
    start = next(i for i, (a, b) in enumerate(zip(today, later, strict=False)) if a != b)
    line = today[today.rfind("\n", 0, start) + 1 :].split("\n")[0]
    message = (
        f"the chat template writes today's date ({line.strip()[:80]!r}): tokens change every day, and a cache made today fits "
        "no later day; set the date in the template, or in chat_template_kwargs (date_string) where it reads one"
    )
    return [Finding("todays_date", "warning", len(tokens), (), message, {"text": line})]


class _Later(datetime.datetime):
    """A clock that is more than a year ahead, in another month and on another day."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return datetime.datetime.now(tz) + datetime.timedelta(days=DAYS_AHEAD)
