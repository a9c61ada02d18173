"""Rows in the forms that people keep them in, made into TRL's: one shape a file, told from the rows, and announced."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtarget.core.errors import ConfigError, DataError, counted
from qtarget.data.files import Located, Place, excerpt, names_of
from qtarget.data.formats.alpaca import ALPACA
from qtarget.data.formats.anthropic import ANTHROPIC
from qtarget.data.formats.faults import Faults
from qtarget.data.formats.hints import empty, hint
from qtarget.data.formats.messages import NullContentError, Said
from qtarget.data.formats.native import LABELLED, MESSAGES, PAIR, TOKENS, text_shape
from qtarget.data.formats.openviking import OPENVIKING, read_session
from qtarget.data.formats.preference import MARKS, is_pair, is_rejected, refusal, rejected_lines
from qtarget.data.formats.shape import ReadOptions, Row, Shape, words
from qtarget.data.formats.sharegpt import SHAREGPT
from qtarget.data.formats.tools import read_kwargs, read_tools

SHAPES = (LABELLED, TOKENS, PAIR, MESSAGES, SHAREGPT, ALPACA, OPENVIKING)
"""The order in which a row's shape is looked for; the text column comes last, and Anthropic's logs are messages too."""
NAMED = {shape.name: shape for shape in (PAIR, MESSAGES, SHAREGPT, ALPACA, ANTHROPIC, OPENVIKING)} | {
    "openai": MESSAGES
}
FORMATS = ("auto", *(name for name in NAMED if " " not in name))
"""What ``format`` may be."""
CONVERSATIONS = ("messages", "prompt", "completion", "conversations", "chosen", "rejected")
TOKEN_NOTES = ("completion_mask", "assistant_masks", "attention_mask", "position_ids", "seq_lengths", "token_type_ids")


@dataclass
class Reading:
    """Rows as training takes them, and what was done to get there.

    Attributes:
        rows: TRL's columns, and the user's notes beside them.
        places: where each row stands.
        shape: name of the form that the rows had.
        announced: what was read, changed and left out; one sentence each.
        changed: whether any row is not as it was in the file.
        dropped: rows left out.
        rejected: how many answers each column marks as not wanted.
    """

    rows: list[Row]
    places: list[Place]
    shape: str
    announced: list[str]
    changed: bool
    dropped: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)


def read_rows(located: Iterable[Located], options: ReadOptions) -> Reading:
    """Rows of one shape, made into TRL's ``messages``, ``prompt`` and ``completion``, text or tokens.

    The first row tells the shape: the first of ``SHAPES`` that it has, or ``options.format``. Columns of another shape,
    which TRL would read too, are left out.

    Args:
        located: values with their places.

    Raises:
        DataError: a row without a usable shape, of another shape than the first, or one that cannot be read; by place.

    Example:
        >>> from pathlib import Path
        >>> row = {"instruction": "Translate to French", "input": "cat", "output": "chat"}
        >>> reading = read_rows([(Place(Path("a.jsonl"), "line 1"), row)], ReadOptions())
        >>> reading.rows[0]["completion"], reading.announced[0][:21]
        ([{'role': 'assistant', 'content': 'chat'}], 'read 1 row as alpaca:')
    """
    _check_options(options)
    values = ((place, _object(place, value)) for place, value in located)
    first = next(values, None)
    if first is None:
        return Reading([], [], "nothing", [], False)
    passed: list[tuple[Place, Row]] = []
    while options.null_content == "drop" and _null(first[1], options):  # it is left out, and tells no shape
        passed.append(first)
        if (first := next(values, None)) is None:
            raise DataError(
                f"{passed[0][0]}: every row lacks a value ({_null(passed[0][1], options)}); nothing is left to train on"
            )
    values = itertools.chain(passed, [first], values)
    if _chosen(*first, options) is OPENVIKING:
        return _sessions(values, options)
    return RowReader(options, first).read(values)


def _check_options(options: ReadOptions) -> None:
    if options.format not in FORMATS:
        near = difflib.get_close_matches(options.format, FORMATS, n=1)
        raise ConfigError(
            f"format {options.format!r}{f': did you mean {near[0]!r}?' if near else ''}; expected one of {', '.join(FORMATS)}"
        )
    if options.null_content not in ("refuse", "drop"):
        raise ConfigError(f"null_content is {options.null_content!r}; expected refuse or drop")


class RowReader:
    """Reads rows that stand one by one, in the shape of the first.

    Args:
        options: how rows are read.
        first: place and row that tell the shape.
    """

    def __init__(self, options: ReadOptions, first: tuple[Place, Row]) -> None:
        self.options = options
        self.first = first[0]
        self.shape = _chosen(*first, options)
        self.said: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self.dropped: list[Place] = []
        self.rejected: Counter[str] = Counter()
        self.kinds: dict[str, Place] = {}
        self.text: bool | None = None

    def read(self, values: Iterable[tuple[Place, Row]]) -> Reading:
        rows, places = [], []
        faults = Faults()
        for place, row in faults.passed(values):
            with faults.kept(place):
                made = self.row(place, row)
                if made is not None:
                    rows.append(made)
                    places.append(place)
        faults.refuse()
        name = "anthropic" if "anthropic" in self.kinds else self.shape.name
        changed = bool(self.said or self.removed or self.dropped) or bool(self.shape.reading)
        lines = self._announced(name, len(rows))
        return Reading(rows, places, name, lines, changed, len(self.dropped), self.rejected)

    def row(self, place: Place, row: Row) -> Row | None:
        """One row as training takes it; None where it is left out.

        Raises:
            DataError: it has another shape than the first, or cannot be read.
        """
        if self.options.null_content == "drop" and _null(row, self.options):
            self.dropped.append(place)
            return None
        found = _chosen(place, row, self.options)
        if found.columns != self.shape.columns:
            raise DataError(
                f"{place}: this row has {words(found.columns)}, but {self.first.seen_from(place)} has "
                f"{words(self.shape.columns)}; one file holds rows of one shape, so split it into two files or rename "
                "the columns"
            )
        shape = self._kind(place, row)
        said: Said = set()
        try:
            made = shape.read(row, self.options, said)
            made |= self._tools(row, said) | read_kwargs(row) if "input_ids" not in made else {}
        except NullContentError as error:
            if self.options.null_content == "refuse":
                raise DataError(f"{place}: {error}") from error
            self.dropped.append(place)
            return None
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        self._check_text(place, made)
        rest = self._notes(place, row, made, shape)
        self.said.update(said)
        self.rejected.update(name for name in MARKS if is_rejected(name, row, made))
        return _in_order(row, made, rest)

    def _kind(self, place: Place, row: Row) -> Shape:
        """OpenAI's and Anthropic's messages have one column; what a row holds tells them apart."""
        if self.shape is not MESSAGES and self.shape is not ANTHROPIC:
            return self.shape
        if self.options.format != "auto":
            return self.shape
        kind = "anthropic" if ANTHROPIC.detect(row) else "openai" if _is_openai(row) else None
        if kind is not None:
            self.kinds.setdefault(kind, place)
        if len(self.kinds) == 2:
            mine, other = self.kinds[str(kind)], self.kinds["openai" if kind == "anthropic" else "anthropic"]
            raise DataError(
                f"{mine}: this row is a message log of {kind}'s form, but {other.seen_from(mine)} is of the other's; one "
                "file holds rows of one shape, so split it into two files"
            )
        return ANTHROPIC if kind == "anthropic" else MESSAGES

    def _tools(self, row: Row, said: Said) -> Row:
        tools = read_tools(row.get("tools"), said)
        if not tools and self.options.tools:
            said.add("the tools given are those of rows without")
            tools = self.options.tools
        if not tools and "functions" in row and "tools" not in row:
            tools = read_tools(row["functions"], said)
            said.add("`functions` -> `tools`")
        return {"tools": tools} if tools else {}

    def _check_text(self, place: Place, made: Row) -> None:
        """Text pairs and conversations in one file would be told apart by the first row alone."""
        if "prompt" not in made:
            return
        text = isinstance(made["prompt"], str)
        if self.text is None:
            self.text = text
        if text != self.text:
            kinds = ("text", "a list of messages")
            raise DataError(
                f"{place}: prompt and completion are {kinds[not text]}, but {self.first.seen_from(place)} has "
                f"{kinds[text]}; give all rows one form"
            )

    def _notes(self, place: Place, row: Row, made: Row, shape: Shape) -> Row:
        """The user's other columns, without those that TRL would read too."""
        if "input_ids" in made:
            return {name: value for name, value in row.items() if name not in made and name not in shape.uses}
        if row.get("labels") is not None:
            raise DataError(
                f"{place}: column 'labels' stands without input_ids, and TRL would take it for token ids to train on; "
                "rename it, for instance to 'label'"
            )
        conflicting = {self.options.text_field, "labels", *CONVERSATIONS, *TOKEN_NOTES} - set(made)
        if not any(row.get(name) for name in ("images", "image", "videos")):
            conflicting |= {"images", "image", "videos"}
        rest = {}
        for name, value in row.items():
            if name in made or name in shape.uses or name in ("tools", "functions", "chat_template_kwargs"):
                continue
            if name in conflicting:
                self.removed[name] += value is not None
            elif not (name == "system" and ("messages" in made or isinstance(made.get("prompt"), list))):
                rest[name] = value
        if rest.get("system") and isinstance(made.get("prompt"), str):
            self.said[
                "column `system` is not read beside prompt and completion that are text: put it into the prompt"
            ] += 1
        return rest

    def _announced(self, name: str, count: int) -> list[str]:
        shape = NAMED.get(name, self.shape)
        reading = f": {shape.reading}" if shape.reading else ""
        lines = [f"read {counted(count, 'row')} as {name}{reading}"]
        lines += [f"{counted(n, 'row')}: {what}" for what, n in sorted(self.said.items())]
        names = [name for name, n in self.removed.items() if n]
        if names:
            they = "are not" if len(names) > 1 else "is not"
            lines.append(
                f"{names_of(names)} {they} what rows of {words(self.shape.columns)} train: left out of training"
            )
        lines += rejected_lines(self.rejected)
        if self.dropped:
            where = ", ".join(str(place) for place in self.dropped[:5])
            more = f" and {len(self.dropped) - 5:,} more" if len(self.dropped) > 5 else ""
            lines.append(
                f"{counted(len(self.dropped), 'row')} left out, a message without content or call: {where}{more}; row numbers "
                "count the rows that are kept"
            )
        return lines


def _is_openai(row: Row) -> bool:
    messages = row["messages"] if isinstance(row.get("messages"), list) else []
    marks = (m for m in messages if isinstance(m, dict))
    return any(m.get("tool_calls") or m.get("function_call") or m.get("role") in ("tool", "function") for m in marks)


def _in_order(row: Row, made: Row, rest: Row) -> Row:
    """Columns that were there first keep their place."""
    whole = {**rest, **made}
    order = [*(name for name in row if name in whole), *(name for name in whole if name not in row)]
    return {name: whole[name] for name in order}


def _sessions(values: Iterator[tuple[Place, Row]], options: ReadOptions) -> Reading:
    """One row a file of OpenViking's."""
    said: Counter[str] = Counter()
    rows, places, count = [], [], 0
    for path, group in itertools.groupby(values, key=lambda item: item[0].path):
        lines = [(str(place), row) for place, row in group]
        count += len(lines)
        messages = read_session(lines, said)
        if not any(m["role"] == "assistant" for m in messages):
            said[f"sessions without an assistant's message are left out ({path})"] += 1
            continue
        rows.append({"messages": messages, **({"tools": options.tools} if options.tools else {})})
        places.append(Place(path, "session"))
    lines = [f"read {counted(count, 'message')} as openviking: {OPENVIKING.reading} ({counted(len(rows), 'row')})"]
    lines += [f"{n:,} {what}" if what[0] not in "`" else f"{n:,} x {what}" for what, n in sorted(said.items())]
    calls = any(message.get("tool_calls") for row in rows for message in row["messages"])
    if calls and not options.tools:
        lines.append(
            "tool schemas are not in these archives, so the prompt is not the one the model saw: give them with "
            "`tools_file: tools.json`, or --tools tools.json of qtarget convert"
        )
    return Reading(rows, places, "openviking", lines, True)


def _object(place: Place, value: Any) -> Row:
    if not isinstance(value, dict):
        import json

        from qtarget.data.files import kind_of

        raise DataError(
            f'{place}: expected an object such as {{"prompt": ..., "completion": ...}}, found {kind_of(value)}: '
            f"{excerpt(json.dumps(value, ensure_ascii=False, default=str))}"
        )
    return value


def _candidates(options: ReadOptions) -> tuple[Shape, ...]:
    text = text_shape(options.text_field)
    if options.format != "auto":
        return (NAMED[options.format],)
    if options.text_field != "text":  # the user named it, so it goes before other people's shapes
        return (LABELLED, TOKENS, PAIR, MESSAGES, text, SHAREGPT, ALPACA, OPENVIKING)
    return (*SHAPES, text)


def _null(row: Row, options: ReadOptions) -> str | None:
    """The column without a value, of a row that would have a shape but for it."""
    candidates = _candidates(options)
    if any(shape.detect(row) for shape in candidates):
        return None
    near = next((shape for shape in candidates if set(shape.columns) <= set(row)), None)
    return next((name for name in near.columns if row[name] is None), None) if near else None


def _chosen(place: Place, row: Row, options: ReadOptions) -> Shape:
    if is_pair(row, options):
        raise DataError(f"{place}: {refusal(row, options)}")
    candidates = _candidates(options)
    for shape in candidates:
        if shape.detect(row) or (options.format == "anthropic" and row.get("messages") is not None):
            return shape
    if (name := _null(row, options)) is not None:
        raise DataError(
            f"{place}: {name!r} is there but holds no value (null): fill it in, remove the row, or leave such rows out with "
            "the config's `null_content: drop` (--null_content drop)"
        )
    if place.path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv")):
        place = Place(place.path, "line 1")  # all rows of a table have the header's columns
    if options.format != "auto":
        (shape,) = candidates
        raise DataError(
            f"{place}: not a row of format {shape.name}, which has {words(shape.columns)}; found "
            f"{', '.join(row) or 'no columns'}.{empty(row, shape.columns)}"
        )
    wanted = "; ".join(words(shape.columns) for shape in candidates)
    known = [name for shape in candidates for name in shape.columns if shape is not OPENVIKING]
    raise DataError(
        f"{place}: no usable columns; found {', '.join(row) or 'none'}, expected one of: {wanted}.{hint(row, known)}"
    )
