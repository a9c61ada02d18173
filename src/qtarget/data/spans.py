"""Weights of characters: ``weight_spans`` of a row or a message, checked, and placed on its tokens.

A token takes the weight of most of its characters; of weights with equal shares, the smaller. Nothing is guessed: tokens
whose decoded text is not the text that they stand for leave the row unplaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from numbers import Real
from typing import Any, NamedTuple

from qtarget.core.errors import DataError
from qtarget.data.columns import Message, parsed_weight

PLACE_MARK = "qzPlaceOfMessageqz"
"""A word that no template rewrites; it marks where a message's text stands in the rendered conversation."""


class UnplacedSpansError(DataError):
    """The text that spans refer to cannot be found in the row's tokens, character by character."""


class Span(NamedTuple):
    """Characters ``start:end`` of a text have this weight."""

    start: int
    end: int
    weight: float


class MarkedText(NamedTuple):
    """A text with spans: a message of the conversation by its index, or the completion (None)."""

    message: int | None
    text: str
    spans: list[Span]


def conversation_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row, prompt and completion joined, as TRL reads them; empty if it is text."""
    if isinstance(row.get("prompt"), list):
        return [*row["prompt"], *(row.get("completion") or [])]
    return row["messages"] if isinstance(row.get("messages"), list) else []


def marked_texts(row: Mapping[str, Any]) -> list[MarkedText]:
    """The texts of a row that carry ``weight_spans``: the row's own are about its response.

    Raises:
        DataError: spans that cannot be read, or that refer to no text.

    Example:
        >>> marked_texts({"prompt": "2+2=", "completion": "5, no: 4", "weight_spans": [[0, 3, 0]]})
        [MarkedText(message=None, text='5, no: 4', spans=[Span(start=0, end=3, weight=0.0)])]
    """
    messages = conversation_of(row)
    values: dict[int | None, list[Any]] = {}
    for i, message in enumerate(messages):
        if (given := _read(message.get("weight_spans"), f"weight_spans of message {i}")) is not None:
            values[i] = given
    if (given := _read(row.get("weight_spans"), "weight_spans")) is not None:
        place = _response_index(messages) if messages else None
        values[place] = values.get(place, []) + given
    return [_marked(row, messages, place, found) for place, found in values.items() if found]


def _marked(row: Mapping[str, Any], messages: Sequence[Message], place: int | None, values: list[Any]) -> MarkedText:
    what = "weight_spans" if place is None else f"weight_spans of message {place}"
    text = row.get("completion") if place is None else messages[place].get("content")
    if not isinstance(text, str):
        raise DataError(
            f"{what} count characters of {'the completion' if place is None else 'its content'}, which is no text here; "
            "give `prompt` and `completion`, or messages with text, or weigh tokens with `loss_weights`"
        )
    return MarkedText(place, text, checked_spans(values, len(text), what))


def _response_index(messages: Sequence[Message]) -> int:
    assistant = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    if not assistant:
        raise DataError("weight_spans are about the last assistant message, and the conversation has none")
    return assistant[-1]


def _read(value: Any, what: str) -> list[Any] | None:
    if isinstance(value, str):  # where Arrow could not hold them
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"{what} is {value!r}; expected a list of [start, end, weight]") from error
    if value is None:
        return None
    if not isinstance(value, Sequence):
        raise DataError(f"{what} is {value!r}; expected a list of [start, end, weight]")
    return list(value)


def checked_spans(values: Sequence[Any], length: int, what: str = "weight_spans") -> list[Span]:
    """Spans in the order of the text.

    Args:
        values: ``[start, end, weight]`` each: characters from ``start`` up to but not including ``end``.
        length: characters of the text.

    Raises:
        DataError: positions that are no integers, end before they start or lie beyond the text, overlaps, or a weight that
            is no finite number of at least 0.

    Example:
        >>> checked_spans([[3, 5, 0.5], [0, 2, 0]], 5)
        [Span(start=0, end=2, weight=0.0), Span(start=3, end=5, weight=0.5)]
    """
    spans = sorted(_checked_span(value, length, f"{what}[{i}]") for i, value in enumerate(values))
    for left, right in pairwise(spans):
        if right.start < left.end:
            raise DataError(
                f"{what}: [{left.start}, {left.end}] and [{right.start}, {right.end}] overlap; give each character one weight"
            )
    return spans


def _checked_span(value: Any, length: int, what: str) -> Span:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 3:
        raise DataError(f"{what} is {value!r}; expected [start, end, weight]")
    for position in value[:2]:  # Arrow turns [0, 5, 0.5] into three floats
        whole = isinstance(position, Real) and not isinstance(position, bool) and float(position).is_integer()
        if not whole:
            raise DataError(f"{what} is {list(value)!r}; expected whole numbers for start and end")
    start, end = int(value[0]), int(value[1])
    if not 0 <= start < end <= length:
        reason = "it ends before it starts" if end < start else "it is empty" if start == end else "it leaves the text"
        raise DataError(
            f"{what} covers characters {start} to {end} of a text of {length}: {reason}; expected 0 <= start < end <= {length}"
        )
    weight = parsed_weight(value[2], f"the weight of {what}")
    if weight is None:
        raise DataError(f"{what} has no weight; expected [start, end, weight]")
    return Span(start, end, weight)


def span_weights(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[float]:
    """The weight of each token by most of its characters (the smaller of two with equal shares); 1 outside of spans.

    Args:
        offsets: ``(start, end)`` of each token in the text; empty ones weigh 1.
        spans: in order, without overlaps.

    Example:
        >>> span_weights([(0, 2), (2, 5), (5, 7)], [Span(0, 3, 0.0), Span(6, 9, 2.0)])
        [0.0, 1.0, 1.0]
    """
    out: list[float] = []
    for start, end in offsets:
        shares: dict[float, int] = {1.0: max(end - start, 0)}
        for span in spans:
            common = min(end, span.end) - max(start, span.start)
            if common > 0:
                shares[1.0] -= common
                shares[span.weight] = shares.get(span.weight, 0) + common
        most = max(shares.values())
        out.append(min(weight for weight, share in shares.items() if share == most) if most else 1.0)
    return out


def placed_weights(
    tokenizer: Any, text: str, input_ids: Sequence[int], spans: Sequence[Span], special: bool
) -> list[float]:
    """The weights of a row's tokens, given the whole text that they were made of.

    Args:
        input_ids: ``[length]`` the tokens of ``text``; more may follow (an end mark).
        spans: in characters of ``text``.
        special: whether the tokenizer added its special tokens.

    Raises:
        UnplacedSpansError: the tokens are not those of the text, or do not decode to it, between the borders of the spans.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UnplacedSpansError("the tokenizer is not a fast one, so it has no character offsets")
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
    if list(input_ids[: len(offsets)]) != encoded["input_ids"]:
        raise UnplacedSpansError("the row's tokens are not those of its text")
    weights = span_weights(offsets, spans)
    first, last = spans[0].start, spans[-1].end
    inside = [i for i, (start, end) in enumerate(offsets) if end > start and end > first and start < last]
    runs = groupby(range(inside[0], inside[-1] + 1) if inside else [], key=lambda i: weights[i])
    reached = first
    for _, run in runs:
        places = list(run)
        start, end = min(offsets[i][0] for i in places), max(offsets[i][1] for i in places)
        decoded = tokenizer.decode([input_ids[i] for i in places], clean_up_tokenization_spaces=False)
        if decoded.strip() != text[start:end].strip() or text[reached:start].strip():
            raise UnplacedSpansError(
                f"tokens decode to {decoded[:40]!r} where the text has {text[min(reached, start) : end][:40]!r}"
            )
        reached = max(reached, end)
    if text[reached:last].strip():
        raise UnplacedSpansError(f"no token stands for {text[reached:last][:40]!r}")
    return weights + [1.0] * (len(input_ids) - len(weights))


def spans_in_row(row: Mapping[str, Any], tokenizer: Any, render: Any) -> list[float] | None:
    """The weights that ``weight_spans`` give a row's tokens, or None where it has none.

    Args:
        row: with ``input_ids``, and the text that they were made of.
        render: the text of some messages, by the template and the options that made the tokens.

    Raises:
        DataError: see ``marked_texts``.
        UnplacedSpansError: see ``placed_weights``; or the template does not put a marked text into the row as it is.
    """
    marked = marked_texts(row)
    if not marked:
        return None
    messages = conversation_of(row)
    if not messages:
        prompt = row.get("prompt") or ""
        spans = _moved(marked[0].spans, len(prompt))
        return placed_weights(tokenizer, prompt + marked[0].text, row["input_ids"], spans, special=True)
    text = render(messages)
    spans = [span for found in marked for span in _in_conversation(render, messages, found, text)]
    return placed_weights(tokenizer, text, row["input_ids"], sorted(spans), special=False) if spans else None


def _moved(spans: Sequence[Span], by: int) -> list[Span]:
    return [Span(start + by, end + by, weight) for start, end, weight in spans]


def _in_conversation(render: Any, messages: Sequence[Message], marked: MarkedText, text: str) -> list[Span]:
    """Spans of a message's content in characters of the rendered conversation; a template may strip the content's ends."""
    i = marked.message
    assert i is not None
    probe = render([*messages[:i], {**messages[i], "content": PLACE_MARK}, *messages[i + 1 :]])
    before, found, after = probe.partition(PLACE_MARK)
    start, end = len(before), len(text) - len(after)
    if found and start <= end and text.startswith(before) and text.endswith(after):
        for shown, lead in ((marked.text, 0), (marked.text.strip(), len(marked.text) - len(marked.text.lstrip()))):
            if text[start:end] == shown:
                moved = _moved(marked.spans, start - lead)
                cut = [Span(max(span.start, start), min(span.end, end), span.weight) for span in moved]
                return [span for span in cut if span.start < span.end]
    raise UnplacedSpansError(f"the chat template does not show the content of message {i} as it is")
