"""Put known noise into demonstrations and mark it, so that one can see which targets learn it and which ignore it.

Marks are character spans in the response, so they hold for every tokenizer; `noise_token_mask` maps them to tokens.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

from qtarget.core.errors import ConfigError, DataError, counted, inflected
from qtarget.data.files import Place

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Span = tuple[int, int]

NOISE_KINDS = (
    *("random_tokens", "wrong_answer", "boilerplate", "contradictory_duplicate"),
    *("other_response", "truncation"),
)
PREAMBLES = (
    "Certainly! I would be happy to help you with that.",
    "Great question! Let me think about this step by step.",
    "Sure, here is what you are looking for.",
    "As a helpful assistant, I am glad to assist you today.",
)


class Edit(NamedTuple):
    """Replace the characters ``start:end`` of a response by ``text``."""

    start: int
    end: int
    text: str


def _response_field(row: Row) -> tuple[Row, str]:
    """The dict that holds the response, and its key there."""
    holder = row.get("completion", row.get("messages"))
    if not isinstance(holder, list):
        return row, "completion"
    assistant = [message for message in holder if message.get("role") == "assistant"]
    return (assistant[-1], "content") if assistant else ({}, "content")


def response_text(row: Row) -> str:
    """The response of a row: its ``completion``, or the last assistant message of ``completion`` or ``messages``.

    Raises:
        DataError: the row has neither, or the response is empty.

    Example:
        >>> response_text({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
        'Hello'
    """
    holder, key = _response_field(row)
    text = holder.get(key)
    if not isinstance(text, str) or not text:
        raise DataError(
            f"row with columns {sorted(row)} has no response; expected a non-empty 'completion' string, "
            "or 'messages' (or a 'completion' list) with an assistant message"
        )
    return text


def _is_empty(row: Row) -> bool:
    """Whether a row has a response in which nothing stands, or a call alone."""
    holder, key = _response_field(row)
    text = holder.get(key)
    return text == "" or (text is None and bool(holder.get("tool_calls")))


def _edited_copy(row: Row, edits: Sequence[Edit], kind: str) -> Row:
    """A deep copy of ``row`` with ``edits`` made in its response, and one mark per edit."""
    if not edits:
        return {**copy.deepcopy(row), "noise_spans": []}
    text, pieces, spans, position, length = response_text(row), [], [], 0, 0
    for edit in sorted(edits):
        kept = text[position : edit.start]
        length += len(kept)
        spans.append([length, length + len(edit.text), kind])
        length += len(edit.text)
        pieces += [kept, edit.text]
        position = edit.end
    edited = copy.deepcopy(row)
    holder, key = _response_field(edited)
    holder[key] = "".join([*pieces, text[position:]])
    return {**edited, "noise_spans": spans}


def _token_spans(text: str, tokenizer: Any | None) -> list[Span]:
    """Character spans of the tokens (words without a tokenizer); tokens inside one character count once."""
    if tokenizer is None:
        return [match.span() for match in re.finditer(r"\S+", text)]
    spans: list[Span] = []
    for start, end in tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]:
        if end > start and (not spans or start >= spans[-1][1]):
            spans.append((start, end))
    return spans


def _vocabulary_texts(tokenizer: Any) -> list[str]:
    """The texts of all printable, non-special tokens that tokenise to themselves, leading space included."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = [i for i in range(len(tokenizer)) if i not in special]
    # Some tokenizers drop the leading space of a first token, so each is decoded behind an anchor.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    cut = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    decoded = tokenizer.batch_decode([[*anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    texts = sorted({text[cut:] for text in decoded})
    texts = [text for text in texts if text.strip() and text.isprintable() and "\ufffd" not in text]
    alone = tokenizer(texts, add_special_tokens=False)["input_ids"]
    behind = tokenizer(["a" + text for text in texts], add_special_tokens=False)["input_ids"]
    kept = [len(one) == 1 or len(two) == len(anchor) + 1 for one, two in zip(alone, behind, strict=True)]
    return [text for text, keep in zip(texts, kept, strict=True) if keep]


def _random_token_edits(rows: Sequence[Row], rate: float, rng: Random, tokenizer: Any | None) -> dict[int, list[Edit]]:
    """Replace exactly ``round(rate * tokens)`` of all response tokens.

    A token with a leading space gives way to one with a leading space, so that its neighbours keep their tokenisation.
    """
    if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "random_tokens needs token offsets, which only a fast tokenizer has; pass one, or tokenizer=None"
        )
    responses = [response_text(row) for row in rows]
    spans = [_token_spans(text, tokenizer) for text in responses]
    if tokenizer is None:
        # sorted: the order of a set changes from process to process, and the seed's draws may not
        pool = sorted({text[start:end] for text, found in zip(responses, spans) for start, end in found})
    else:
        pool = _vocabulary_texts(tokenizer)
    pools = {spaced: [text for text in pool if text[0].isspace() == spaced] for spaced in (False, True)}
    places = [(index, span) for index, found in enumerate(spans) for span in found]
    edits: dict[int, list[Edit]] = {}
    failed = 0
    for index, (start, end) in rng.sample(places, round(rate * len(places))):
        old = responses[index][start:end]
        candidates = [text for text in pools[old[0].isspace()] or pool if text != old]
        if candidates:
            edits.setdefault(index, []).append(Edit(start, end, rng.choice(candidates)))
        else:
            failed += 1
    if failed:
        logger.warning("random_tokens: %d tokens stay as they were: the data has no other word to put there", failed)
    return edits


def _answer_span(row: Row) -> Span | None:
    """Where the answer last stands as a whole word, None if nowhere; the whole response for rows without ``answer``."""
    text = response_text(row)
    if "answer" not in row:
        return 0, len(text)
    found = list(re.finditer(rf"(?<!\w){re.escape(str(row['answer']))}(?!\w)", text))
    return found[-1].span() if found else None


def _wrong_answer_edits(rows: Sequence[Row], rate: float, rng: Random, kind: str) -> dict[int, list[Edit]]:
    """For ``round(rate * rows)`` rows, a different answer (or response) of another row with the same skill."""
    stated = [str(row["answer"]) if "answer" in row else response_text(row) for row in rows]
    groups = [("answer" in row, row.get("skill")) for row in rows]
    answers: dict[tuple[bool, Any], list[str]] = {}
    for group, answer in zip(groups, stated):
        answers.setdefault(group, []).append(answer)
    distinct = {group: len(set(found)) for group, found in answers.items()}
    places = {index: span for index, row in enumerate(rows) if (span := _answer_span(row)) is not None}
    applicable = [index for index in places if distinct[groups[index]] > 1]
    wanted = round(rate * len(rows))
    if wanted and len(applicable) < len(rows):
        logger.warning(
            "%s: %d of %d rows cannot take it (the response does not state the answer, or no other row of the same "
            "skill has another one); %d rows asked for, %d changed",
            kind, len(rows) - len(applicable), len(rows), wanted, min(wanted, len(applicable)),
        )  # fmt: skip
    edits = {}
    for index in rng.sample(applicable, min(wanted, len(applicable))):
        wrong = stated[index]
        # this ends: the group holds another answer
        while wrong == stated[index]:
            wrong = rng.choice(answers[groups[index]])
        edits[index] = [Edit(*places[index], wrong)]
    return edits


def _boilerplate_edits(rows: Sequence[Row], rate: float, rng: Random) -> dict[int, list[Edit]]:
    """Put one of `PREAMBLES`, as a line of its own, in front of ``round(rate * rows)`` responses."""
    chosen = rng.sample(range(len(rows)), round(rate * len(rows)))
    # Behind a space, the first clean word would become one token with it and count as noise.
    return {index: [Edit(0, 0, rng.choice(PREAMBLES) + "\n")] for index in chosen}


def _other_response_edits(rows: Sequence[Row], rate: float, rng: Random) -> dict[int, list[Edit]]:
    """For ``round(rate * rows)`` rows, the whole response of another row, whatever its skill."""
    responses = [response_text(row) for row in rows]
    if rate and len(set(responses)) < 2:
        raise DataError("other_response needs rows of at least two different responses; these all have one")
    edits = {}
    for index in rng.sample(range(len(rows)), round(rate * len(rows))):
        other = responses[index]
        while other == responses[index]:  # this ends: there is another one
            other = rng.choice(responses)
        edits[index] = [Edit(0, len(responses[index]), other)]
    return edits


def _truncation_edits(rows: Sequence[Row], rate: float, rng: Random) -> dict[int, list[Edit]]:
    """``round(rate * rows)`` responses of several words end too early; the last word that is left is marked."""
    words = [[match.span() for match in re.finditer(r"\S+", response_text(row))] for row in rows]
    applicable = [index for index, found in enumerate(words) if len(found) > 1]
    wanted = round(rate * len(rows))
    if wanted > len(applicable):
        logger.warning(
            "truncation: %d of %d rows are of one word and cannot be cut; %d rows asked for, %d changed",
            len(rows) - len(applicable), len(rows), wanted, len(applicable),
        )  # fmt: skip
    edits = {}
    for index in rng.sample(applicable, min(wanted, len(applicable))):
        start, end = words[index][rng.randrange(len(words[index]) - 1)]
        text = response_text(rows[index])
        edits[index] = [Edit(start, len(text), text[start:end])]
    return edits


def _edits(rows: Sequence[Row], kind: str, rate: float, rng: Random, tokenizer: Any | None) -> dict[int, list[Edit]]:
    if kind == "random_tokens":
        return _random_token_edits(rows, rate, rng, tokenizer)
    if kind == "boilerplate":
        return _boilerplate_edits(rows, rate, rng)
    if kind == "other_response":
        return _other_response_edits(rows, rate, rng)
    if kind == "truncation":
        return _truncation_edits(rows, rate, rng)
    return _wrong_answer_edits(rows, rate, rng, kind)


def inject_noise(
    rows: Sequence[Mapping[str, Any]],
    *,
    kind: str,
    rate: float,
    seed: int,
    tokenizer: Any | None = None,
    places: Sequence[Place] | None = None,
) -> list[Row]:
    """Copies of ``rows`` with noise of one kind, every touched character marked in ``noise_spans``.

    Args:
        rows: with ``completion`` (string or messages) or ``messages``; ``answer`` and ``skill`` are used where present.
        kind: ``random_tokens`` replaces response tokens by other vocabulary tokens (words by other words of the data if
            there is no ``tokenizer``); ``wrong_answer`` states another row's answer of the same skill, or another row's
            whole response where rows have no ``answer``; ``boilerplate`` puts a preamble in front;
            ``contradictory_duplicate`` follows a row by a copy that states a wrong answer, and marks the copy;
            ``other_response`` gives a row the whole response of another; ``truncation`` ends a response at one of its words,
            and marks that word: what is wrong is that nothing follows.
        rate: in [0, 1]: the share of all response tokens for ``random_tokens``, of the rows whose response is not empty for
            the other kinds.
        seed: the same seed and rows give the same noise.
        tokenizer: a fast Hugging Face tokenizer; only ``random_tokens`` looks at it.
        places: where each row stands, for messages; default: rows are counted.

    Returns:
        New rows with ``noise_spans: list[[start, end, kind]]``, character positions in the *new* response, empty where
        nothing was touched. ``answer`` stays the right answer. Where a kind fits fewer rows than asked for, all that
        fit are changed, and a warning is logged with the counts. Rows whose response is empty, or a call alone, stay as they
        are, and are counted in a warning.

    Raises:
        ConfigError: unknown kind, or a rate outside [0, 1].
        DataError: a row without a response, no response in any row, a row that is marked already, or a slow tokenizer.

    Example:
        >>> rows = [{"prompt": "1+1?", "completion": "It is 2.", "answer": "2"},
        ...         {"prompt": "2+3?", "completion": "It is 5.", "answer": "5"}]
        >>> inject_noise(rows, kind="wrong_answer", rate=1, seed=0)[1]
        {'prompt': '2+3?', 'completion': 'It is 2.', 'answer': '5', 'noise_spans': [[6, 7, 'wrong_answer']]}
    """
    if kind not in NOISE_KINDS:
        raise ConfigError(f"unknown noise kind {kind!r}; known kinds: {', '.join(NOISE_KINDS)}")
    if not 0 <= rate <= 1:
        raise ConfigError(f"noise rate is {rate}; expected a share between 0 and 1")
    clean = [dict(row) for row in rows]
    named = places or [f"row {number}" for number in range(1, len(clean) + 1)]
    spoken: list[int] = []
    for number, (row, place) in enumerate(zip(clean, named, strict=True)):
        try:
            if not _is_empty(row) and response_text(row):
                spoken.append(number)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if row.get("noise_spans"):
            raise DataError(f"{place} is marked as noisy already; inject into clean rows, one kind per row")
    if clean and not spoken:
        raise DataError(
            f"all responses are empty, or a call alone, from {named[0]} to {named[-1]}; there is no text to put noise into: "
            "give at least one row a response in words"
        )
    if silent := len(clean) - len(spoken):
        logger.warning(
            "%s with an empty response %s unchanged; the rate is that of the other %s",
            counted(silent, "row"), inflected(silent, "stay"), f"{len(spoken):,}",
        )  # fmt: skip
    found = _edits([clean[number] for number in spoken], kind, rate, Random(f"{seed}-{kind}"), tokenizer)
    edits = {spoken[index]: made for index, made in found.items()}
    noisy: list[Row] = []
    for index, row in enumerate(clean):
        if kind == "contradictory_duplicate":
            noisy.append(_edited_copy(row, [], kind))
        if kind != "contradictory_duplicate" or index in edits:
            noisy.append(_edited_copy(row, edits.get(index, []), kind))
    return noisy


def noise_token_mask(offsets: Sequence[Span], spans: Sequence[Sequence[Any]]) -> list[bool]:
    """For every token, whether it overlaps a noise span.

    Args:
        offsets: ``(start, end)`` character positions of each token in the response; empty ones are never noise.
        spans: ``noise_spans`` of the row.

    Example:
        >>> noise_token_mask([(0, 2), (2, 5), (5, 6)], [[4, 5, "random_tokens"]])
        [False, True, False]
    """
    return [any(start < span[1] and span[0] < end and start < end for span in spans) for start, end in offsets]
