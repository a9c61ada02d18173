"""Does what the user wrote arrive in the rendered row, and is trained what should be? Pure text against text.

A row is cut into pieces, each of which must be found; where one is not, ``losses`` says which characters are missing.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from qtarget.data.checks.findings import ROWS_NAMED, Finding, Severity, finding

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation")
EXCERPT_CHARACTERS = 60
UNREADABLE_SHARE = 0.5
"""Rows that lose more of their characters than this teach nothing that was written."""

# check -> (severity, what "3 of 100 rows ..." do, the next step); the order is that of the messages
CHECKS: dict[str, tuple[Severity, str, str]] = {
    "template_raises": (
        "error",
        "cannot be rendered",
        "change these rows as the template asks (some want `content: ''` beside a call in the place of null), or set "
        "chat_template_path to a template that takes them",
    ),
    "null_content": (
        "error",
        "have a message without content and without a call",
        "fill it in, or remove the row: training on nothing teaches an empty answer",
    ),
    "empty_answer": (
        "warning",
        "have an empty answer, or only white space",
        "they are trained as written and teach to end at once; remove them unless that is meant",
    ),
    "content_dropped": (
        "error",
        "have content that does not arrive in the rendered text",
        "set chat_template_path to a template that writes it, or remove it from the rows",
    ),
    "parts_changed": (
        "error",
        "give content as a list of parts, which the chat template does not write as it writes their text",
        "give the text itself as content, or use a template that reads parts",
    ),
    "nested_nulls": (
        "error",
        "hold null in tool arguments or tool schemas",
        "Arrow gives all rows the keys of each: build the data with Dataset.from_list(rows, on_mixed_types='use_json'), "
        "or give arguments and tools as JSON text",
    ),
    "untrained_answer": (
        "error",
        "have an answer that is not trained on as a whole",
        "correct the {% generation %} marks of the chat template: they must hold the answer, its tool calls and its end",
    ),
    "foreign_text": (
        "error",
        "train on text of the system, the user or a tool",
        "set assistant_only_loss: true, and correct the {% generation %} marks of the chat template",
    ),
    "reasoning_dropped": (
        "warning",
        "have thoughts that the chat template leaves out",
        "many templates keep those of the last turn alone; split the conversation, or use a template that keeps them",
    ),
    "unknown_roles": (
        "warning",
        "have roles that chat templates do not know",
        "rename them: human is user, gpt and bot are assistant",
    ),
    "merged_boundary": (
        "warning",
        "have a prompt whose end is one token with the start of the completion, and is trained with it",
        "end the prompt before a white space, and begin the completion with it",
    ),
    "text_lost": (
        "warning",
        "lose text in the tokenizer",
        "replace these characters, or use a tokenizer that has them",
    ),
}


@dataclass(frozen=True)
class Piece:
    """Text that must be found in the rendered row.

    Attributes:
        where: what it is, for messages: ``content of user``.
        forms: any of them is enough (``3`` and ``3.0``, with and without JSON's escapes).
        trained: whether it is to be trained; None where both is right.
        soft: a template may leave it out by design (thoughts).
    """

    where: str
    forms: tuple[str, ...]
    trained: bool | None
    soft: bool = False

    def within(self, text: str) -> bool:
        """Whether one of the forms is there."""
        return any(form in text for form in self.forms)


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong with one row.

    Attributes:
        row: its number in the data.
        check: a name of ``CHECKS``.
        where: of which part.
        text: an excerpt, or the template's own words.
        lost: of ``text_lost``, characters lost by class; ``characters`` of the piece in all.
    """

    row: int
    check: str
    where: str
    text: str = ""
    lost: Mapping[str, int] | None = None
    characters: int = 0


def message_pieces(message: Mapping[str, Any], trained: bool | None) -> Iterator[Piece]:
    """Content, calls with their arguments, and thoughts of one message.

    Example:
        >>> call = {"function": {"name": "rain", "arguments": {"city": "Oslo", "days": 3}}}
        >>> [p.forms[0] for p in message_pieces({"role": "assistant", "content": " Hi ", "tool_calls": [call]}, True)]
        ['Hi', 'rain', 'city', 'Oslo', 'days', '3']
    """
    role = message.get("role")
    thought = "</think>" in str(message.get("content") or "") and role == "assistant"
    for text in content_texts(message.get("content")):
        if text.strip():
            head, mark, tail = text.rpartition("</think>") if thought else ("", "", text)
            if mark and head.replace("<think>", "").strip():
                yield Piece(f"thoughts of {role}", (head.replace("<think>", "").strip(),), None, soft=True)
            if tail.strip():
                yield Piece(f"content of {role}", (tail.strip(),), trained)
    for call in calls_of(message):
        yield Piece(f"the call's name in {role}", (str(call.get("name")),), trained)
        for value in leaves(arguments_of(call)):
            yield Piece(f"an argument of the call in {role}", forms_of(value), trained)
    for key in ("reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str) and message[key].strip():
            yield Piece(f"{key} of {role}", (message[key].strip(),), None, soft=True)


def content_texts(content: Any) -> list[str]:
    """The texts of a message's content: itself, or those of its parts."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [part["text"] if isinstance(part, Mapping) else str(part) for part in content if _has_text(part)]
    return []


def _has_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and isinstance(part.get("text"), str))


def calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """``{"name", "arguments"}`` of each tool call, an old ``function_call`` too."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    return [*calls, *([message["function_call"]] if message.get("function_call") else [])]


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments as an object, where they are JSON text or one already."""
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except ValueError:
            return arguments
    return arguments


def leaves(value: Any) -> Iterator[Any]:
    """Keys and scalar values of nested objects, None left out.

    Example:
        >>> list(leaves({"a": [1, {"b": None}], "c": ""}))
        ['a', 1, 'b', 'c']
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(leaves, value))
    elif value is not None and value != "":
        yield value


def holds_null(value: Any) -> bool:
    """Whether a nested object has a None somewhere.

    Example:
        >>> holds_null({"a": [{"b": None}]}), holds_null({"a": 0})
        (True, False)
    """
    if isinstance(value, Mapping):
        return any(map(holds_null, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_null, value))
    return value is None


def forms_of(value: Any) -> tuple[str, ...]:
    """How templates write a value.

    Example:
        >>> forms_of(3.0), forms_of(True), forms_of("é")
        (('3.0', '3'), ('true', 'True'), ('é', '\\\\u00e9'))
    """
    if isinstance(value, bool):
        return json.dumps(value), str(value)
    if isinstance(value, int | float):
        whole = (str(int(value)),) if value == value // 1 and abs(value) < 1e15 else ()
        return tuple(
            dict.fromkeys((json.dumps(value), *whole, f"{value:g}" if float(f"{value:g}") == value else str(value)))
        )
    text = str(value)
    escaped = (json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))
    twice = (json.dumps(form)[1:-1] for form in [json.dumps(text, ensure_ascii=False)[1:-1]])
    return tuple(dict.fromkeys((text, text.strip(), *escaped, *twice)))


def tool_pieces(tools: Any) -> list[Piece]:
    """The name of each tool's schema."""
    named = [tool.get("function") or tool for tool in tools or [] if isinstance(tool, Mapping)]
    return [Piece("a tool's schema", (str(tool["name"]),), None) for tool in named if tool.get("name")]


def losses(written: str, read: str) -> tuple[dict[str, int], str]:
    """Characters of a text that are not in what its tokens decode to, by class; and what was changed if none is lost.

    Returns:
        Lost characters by class (``character_class``); and, if only their form changed, which: ``case``, ``compatibility
        forms (NFKC)``, ``accents`` or ``white space``.

    Example:
        >>> losses("Room 101", "Room <unk>"), losses("Abc", "abc")
        (({'digits': 3}, ''), ({}, 'case'))
    """
    for name, normalise in NORMALISATIONS:
        if normalise(written) == normalise(read):
            return {}, name
    weakest = NORMALISATIONS[-1][1]
    gone = Counter(written) - Counter(read)
    lost: Counter[str] = Counter()
    for character, count in (Counter(weakest(written)) - Counter(weakest(read))).items():
        lost[character_class(character)] += count
    changed = "case" if not lost and gone else ""
    return dict(lost), changed


def _stripped(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if not unicodedata.combining(c))


NORMALISATIONS = (
    ("white space", lambda text: "".join(text.split())),
    ("case", lambda text: "".join(text.split()).casefold()),
    ("compatibility forms (NFKC)", lambda text: "".join(unicodedata.normalize("NFKC", text).split()).casefold()),
    ("accents", lambda text: "".join(_stripped(text).split())),
)


def character_class(character: str) -> str:
    """Digits, Latin letters, letters of another script, emoji and symbols, punctuation, white space, control characters.

    Example:
        >>> [character_class(c) for c in "7aжé🙂,\\n"]
        ['digits', 'Latin letters', 'Cyrillic letters', 'Latin letters', 'symbols and emoji', 'punctuation', 'white space']
    """
    kind = unicodedata.category(character)
    if character.isspace():
        return "white space"
    if kind[0] in "LM":
        script = unicodedata.name(character, "UNKNOWN").split()[0].capitalize().removesuffix("-compatibility")
        return f"{ {'Cjk': 'CJK', 'Unknown': 'other'}.get(script, script) } letters"
    named = {"N": "digits", "S": "symbols and emoji", "P": "punctuation", "Z": "white space"}
    return named.get(kind[0], "control characters")


def excerpt(text: str) -> str:
    """The start of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "..."


def findings_of(issues: Sequence[Issue], rows: int) -> list[Finding]:
    """One finding a check and cause; the first excerpts beside.

    Args:
        issues: of all rows, in any order.
        rows: looked at.
    """
    found: list[Finding] = []
    for check in CHECKS:
        mine = sorted((issue for issue in issues if issue.check == check), key=lambda issue: issue.row)
        if not mine:
            continue
        if check == "text_lost":
            found += _lost(mine, rows)
            continue
        groups: dict[str, list[Issue]] = {}
        for issue in mine:  # one block a cause: a template's own words, or the part that is lost
            groups.setdefault(issue.text if check == "template_raises" else issue.where, []).append(issue)
        for group in groups.values():
            found += _grouped(check, group, rows)
    return found


def _grouped(check: str, group: Sequence[Issue], rows: int) -> list[Finding]:
    severity, what, step = CHECKS[check]
    first = {issue.row: issue for issue in reversed(group)}  # the first of each row, which has an excerpt
    concerned = sorted(first)
    where = f" ({group[0].where})" if group[0].where else ""
    said = f": {group[0].text!r}" if group[0].text else ""
    examples = [
        {"row": issue.row, "text": issue.text or issue.where}
        for issue in map(first.__getitem__, concerned[:ROWS_NAMED])
    ]
    return finding(check, severity, concerned, rows, what + where + said, step, part=group[0].where, examples=examples)


def _lost(issues: Sequence[Issue], rows: int) -> list[Finding]:
    severity, what, step = CHECKS["text_lost"]
    found: list[Finding] = []
    by_class: Counter[str] = Counter()
    for issue in issues:
        by_class.update(issue.lost or {})
    lossy = [issue for issue in issues if issue.lost]
    if lossy:
        lost, characters = sum(by_class.values()), sum(issue.characters for issue in lossy)
        share = lost / max(1, characters)
        shares = ", ".join(f"{count} {name}" for name, count in by_class.most_common())
        examples = [{"row": issue.row, "text": issue.text} for issue in lossy[:ROWS_NAMED]]
        found += finding(
            "text_lost", "error" if share >= UNREADABLE_SHARE else severity,
            list(dict.fromkeys(issue.row for issue in lossy)), rows,
            f"{what}: {lost} of their {characters} characters ({share:.1%}: {shares})", step,
            lost=dict(by_class), characters=characters, share=round(share, 6), examples=examples,
        )  # fmt: skip
    changed: dict[str, list[Issue]] = {}
    for issue in issues:
        if not issue.lost:
            changed.setdefault(issue.where, []).append(issue)
    for name, group in changed.items():
        examples = [{"row": issue.row, "text": issue.text} for issue in group[:ROWS_NAMED]]
        found += finding(
            "text_changed", "warning", list(dict.fromkeys(issue.row for issue in group)), rows,
            f"are changed by the tokenizer, which does not keep {name}",
            "no character is lost otherwise; where that matters, use a tokenizer that keeps it", kept=name, examples=examples,
        )  # fmt: skip
    return found
