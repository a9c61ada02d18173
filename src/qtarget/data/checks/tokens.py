"""Checks of tokenised rows before they are cut: end marks, masks, unknown tokens, lengths. One pass each, no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.core.errors import DataError, counted, inflected
from qtarget.data.checks.audit import IGNORE_INDEX
from qtarget.data.checks.findings import ROWS_NAMED, Finding, finding, named
from qtarget.data.checks.flat import FlatRows
from qtarget.data.columns import message_token_weights

END_WINDOW = 3
"""An end mark counts within so many last labels: ChatML writes a line end after its own."""
HEADER = 4
"""First tokens of a row, of which a mask that hides its prompt hides every one."""
RUNAWAY_SHARE, USUAL_SHARE = 0.98, 0.8
"""A mask that keeps this share of a row has run away when half of all rows keep less than the other."""
BYTE_SHARE = 0.2
WINDOW = 6
ROLES_CHECKED = 5000
"""Role masks render every conversation again; of more rows than this an even sample is looked at."""

TokenRow = Mapping[str, Any]


@dataclass(frozen=True)
class Vocabulary:
    """What the checks need to know of tokenizer and model.

    Attributes:
        size: ids from 0 that the model has embeddings for.
        end_ids: tokens that end an answer.
        unknown_id: the id of text that the tokenizer does not know; None if it has none.
        byte_ids: byte-fallback tokens (``<0xE2>``).
        decode: ids to text.
        positions: tokens of a row that the model was made for; None where it does not say.
        has_table: whether positions are rows of a table, beyond which the model fails.
    """

    size: int
    end_ids: frozenset[int]
    unknown_id: int | None
    byte_ids: frozenset[int]
    decode: Callable[[list[int]], str]
    positions: int | None = None
    has_table: bool = False

    @classmethod
    def of(
        cls, tokenizer: Any, size: int | None = None, end_ids: Sequence[int] = (), positions: int | None = None
    ) -> Vocabulary:
        """Of a Hugging Face tokenizer.

        Args:
            size: of the model's embeddings; the tokenizer's length if unknown.
            end_ids: of the model's generation config, beside the tokenizer's own.
            positions: of the model's config.
        """
        ends = end_marks(tokenizer, end_ids)
        # GPT-2 names its end mark as unknown token too, and never uses it as such
        marks = {tokenizer.eos_token_id, tokenizer.bos_token_id}
        unknown = None if tokenizer.unk_token_id in marks else tokenizer.unk_token_id
        bytes_ = {i for token, i in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
        return cls(size or len(tokenizer), ends, unknown, frozenset(bytes_), tokenizer.decode, positions)


def end_marks(tokenizer: Any, end_ids: Sequence[int] = ()) -> frozenset[int]:
    """Tokens that can end an answer: special ones that begin, pad or replace nothing, and ends that somebody names."""
    starts = {tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.eos_token_id}
    return frozenset((set(tokenizer.all_special_ids) - starts) | set(end_ids))


def usual_end(rows: Sequence[TokenRow] | FlatRows, marks: frozenset[int]) -> int | None:
    """The end mark that most rows are trained to end with; None where none has one.

    Example:
        >>> usual_end([{"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}], frozenset({2, 3}))
        2
    """
    flat = FlatRows.of(rows)
    places = np.flatnonzero(flat.last_trained(END_WINDOW) & np.isin(flat.ids, list(marks)))
    last = np.append(np.diff(flat.rows[places]) > 0, True)[: len(places)]  # of several, the one that ends the row
    ids, counts = np.unique(flat.ids[places][last], return_counts=True)
    return int(ids[counts.argmax()]) if len(ids) else None


def check_tokens(
    rows: Sequence[TokenRow] | FlatRows, vocabulary: Vocabulary, *, max_length: int | None
) -> list[Finding]:
    """All checks of this file but that of roles.

    Args:
        rows: ``input_ids`` and ``labels`` each (arrays or lists, unshifted, -100 ignored), not cut to ``max_length``.
    """
    flat = FlatRows.of(rows)
    known = check_known(flat, vocabulary)
    return [
        *known,
        *check_positions(flat, vocabulary, max_length),
        *check_ends(flat, vocabulary),
        *check_runaway(flat),
        *check_lengths(flat, max_length),
    ]


def trained_positions(row: TokenRow) -> np.ndarray:
    """Positions with a label that some token predicts, ascending."""
    return np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORE_INDEX) + 1


def check_ends(rows: Sequence[TokenRow] | FlatRows, vocabulary: Vocabulary) -> list[Finding]:
    """Rows whose last labels hold no end mark, though they are not cut yet."""
    flat = FlatRows.of(rows)
    ends = flat.last_trained(END_WINDOW) & np.isin(flat.ids, list(vocabulary.end_ids))
    missing = np.flatnonzero((flat.trained_counts > 0) & (flat.count(ends) == 0)).tolist()
    examples = [{"row": i, "text": _last_text(flat, i, vocabulary)} for i in missing[:ROWS_NAMED]]
    what = "end without an end-of-sequence or end-of-turn token among their labels"
    step = (
        "append the tokenizer's eos_token, or put the end of the turn inside {% generation %}; else the model does "
        "not learn to stop"
    )
    trained_rows = int((flat.trained_counts > 0).sum())
    return finding("missing_end", "warning", missing, trained_rows, what, step, examples=examples)


def _last_text(flat: FlatRows, i: int, vocabulary: Vocabulary) -> str:
    place = flat.row(i)
    ids = flat.ids[place][flat.trained[place]][-WINDOW:]
    return vocabulary.decode(ids[(ids >= 0) & (ids < vocabulary.size)].tolist())


def check_known(rows: Sequence[TokenRow] | FlatRows, vocabulary: Vocabulary) -> list[Finding]:
    """Ids that the model has no embedding for, unknown tokens, rows written mostly in bytes."""
    flat = FlatRows.of(rows)
    beyond = (flat.ids < 0) | (flat.ids >= vocabulary.size)
    outside = np.flatnonzero(flat.count(beyond)).tolist()
    inside = np.isin(flat.rows, outside, invert=True) if outside else np.ones(len(flat.ids), dtype=bool)
    strange = inside & (flat.ids == (-1 if vocabulary.unknown_id is None else vocabulary.unknown_id))
    unknown = np.flatnonzero(flat.count(strange)).tolist()
    examples = [_unknown_example(flat, i, strange, vocabulary) for i in unknown[:ROWS_NAMED]]
    in_byte = inside & np.isin(flat.ids, list(vocabulary.byte_ids)) if vocabulary.byte_ids else np.zeros_like(inside)
    in_bytes = np.flatnonzero(flat.count(in_byte) > BYTE_SHARE * flat.lengths).tolist()
    largest = int(flat.ids[beyond].max()) if outside else 0
    first = f"; row {outside[0] + 1} holds {int(flat.ids[beyond & (flat.rows == outside[0])][0])}" if outside else ""
    masked = bool(outside) and bool((flat.ids[beyond] == IGNORE_INDEX).all())
    found = finding(
        "outside_vocabulary", "error", outside, len(flat),
        f"hold token ids outside the model's vocabulary (0 to {vocabulary.size - 1}, the rows of its embedding; the largest is "
        f"{largest}{first})",
        "-100 masks labels, and stands in no input_ids: give the token's id there" if masked
        else "use the model's own tokenizer, or resize its embeddings", largest_id=largest, vocabulary=vocabulary.size,
    )  # fmt: skip
    found += finding(
        "unknown_tokens", "warning", unknown, len(flat),
        f"hold text that the tokenizer does not know ({int(strange.sum())} unknown tokens)",
        "replace these characters, or use a tokenizer with byte fallback: the model would learn to write the unknown token",
        tokens=int(strange.sum()), examples=examples,
    )  # fmt: skip
    return found + finding(
        "byte_tokens", "warning", in_bytes, len(flat),
        f"are written in single bytes for more than {BYTE_SHARE:.0%} of their tokens",
        "check their encoding; text in a script that the tokenizer lacks costs several tokens a character",
    )  # fmt: skip


def _unknown_example(flat: FlatRows, i: int, strange: np.ndarray, vocabulary: Vocabulary) -> dict[str, Any]:
    place = flat.row(i)
    ids, at = flat.ids[place], int(np.flatnonzero(strange[place])[0])
    return {"row": i, "position": at, "text": vocabulary.decode(ids[max(0, at - WINDOW) : at + WINDOW].tolist())}


def check_positions(
    rows: Sequence[TokenRow] | FlatRows,
    vocabulary: Vocabulary,
    max_length: int | None,
    *,
    filled: bool = False,
    whose: str = "the model",
) -> list[Finding]:
    """Rows that stay longer than the model was made for, though ``max_length`` cuts them.

    Args:
        vocabulary: of that model.
        whose: what messages call it.
        filled: rows are joined and cut anew, so that each has ``max_length`` tokens.
    """
    flat = FlatRows.of(rows)
    kept = flat.lengths if max_length is None else np.minimum(flat.lengths, max_length)
    if filled and max_length is not None:
        kept = np.full(len(flat), max_length)
    positions = vocabulary.positions
    return finding(
        "beyond_model", "error" if vocabulary.has_table else "warning",
        [] if positions is None else np.flatnonzero(kept > positions).tolist(), len(flat),
        f"are, as they are trained, longer than the {positions} tokens that {whose} was made for",
        f"set max_length to {positions} or less, or split them", positions=positions, max_length=max_length,
    )  # fmt: skip


def check_runaway(rows: Sequence[TokenRow] | FlatRows) -> list[Finding]:
    """Rows trained on nearly whole, where most rows mask their prompt."""
    # rows that train on nothing are another finding and would pull the median down
    flat = FlatRows.of(rows)
    shares = flat.trained_counts / np.maximum(1, flat.lengths - 1)
    usual = float(np.median(shares[shares > 0])) if (shares > 0).any() else 1.0
    if usual > USUAL_SHARE:
        return []
    # a long answer to a short prompt is trained on nearly whole, too: a mask that runs away begins where the row does
    places = np.arange(len(flat.ids)) - flat.starts[flat.rows]
    unmasked = flat.count(flat.trained & (places <= HEADER)) > 0
    what = (
        f"train on {RUNAWAY_SHARE:.0%} or more of their tokens, the first ones too, where half of the rows train on {usual:.0%} or "
        "less"
    )
    step = "look at their mask: prompt and system text should be masked as in the other rows"
    return finding(
        "runaway_mask", "warning", np.flatnonzero((shares >= RUNAWAY_SHARE) & unmasked).tolist(), len(flat), what, step,
        median_share=round(usual, 4),
    )  # fmt: skip


def check_lengths(rows: Sequence[TokenRow] | FlatRows, max_length: int | None) -> list[Finding]:
    """Tokens a row as quantiles, against ``max_length``; a fact, not a defect."""
    flat = FlatRows.of(rows)
    if not len(flat):
        return []
    lengths, labels = flat.lengths, flat.trained_counts
    names = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    # a length that some row has, not one between two
    values = {name: int(np.percentile(lengths, q, method="higher")) for name, q in names.items()}
    over = int((lengths > max_length).sum()) if max_length is not None else 0
    words = ", ".join(f"{name} {value}" for name, value in values.items())
    limit = (
        "no max_length"
        if max_length is None
        else f"max_length {max_length}: {counted(over, 'row')} {inflected(over, 'are')} longer"
    )
    share = f"{labels.sum() / max(1, lengths.sum()):.0%} of all tokens are trained on" + ", before the cut" * bool(over)
    message = f"tokens a row: {words}; {limit}; {share}"
    evidence = values | {
        "max_length": max_length,
        "over_max_length": over,
        "tokens": int(lengths.sum()),
        "trained_tokens": int(labels.sum()),
    }
    return [Finding("lengths", "info", len(flat), (), message, evidence)]


ANSWERS_ALONE = (
    "set assistant_only_loss: true, or, where the chat template marks no answers, give all other messages `weight: 0`, if the "
    "model is not to write users' turns"
)
"""What to do about conversations that are trained whole."""


def check_roles(
    raw: Sequence[Mapping[str, Any]],
    rows: Sequence[TokenRow],
    tokenizer: Any,
    *,
    chat_template: str | None,
    assistant_only: bool,
) -> list[Finding]:
    """Conversations in which text of the system, the user or a tool is trained on.

    An error under ``assistant_only_loss``, which promises that it is not; else a warning.

    Args:
        raw: the same rows as the user wrote them; those without messages are skipped.
        chat_template: with which they were rendered; None for the tokenizer's own.

    Returns:
        ``foreign_text`` of the rows that could be checked, and ``roles_unchecked`` where some could not.
    """
    talking = [i for i, row in enumerate(raw) if conversation(row)]
    # no conversation at all: a step may not be 0
    looked = talking[:: -(-len(talking) // ROLES_CHECKED) or 1]
    foreign, untraceable, tokens, trained, examples = [], [], 0, 0, []
    for i in looked:
        ids, places = np.asarray(rows[i]["input_ids"]), trained_positions(rows[i])
        owned = _owned_by_assistant(raw[i], ids, tokenizer, chat_template) if len(places) else np.ones(len(ids), bool)
        if owned is None:
            untraceable.append(i)
            continue
        wrong = places[~owned[places]]
        tokens, trained = tokens + len(wrong), trained + len(places)
        if len(wrong):
            foreign.append(i)
            if len(examples) < ROWS_NAMED:
                text = tokenizer.decode(ids[wrong[: 4 * WINDOW]].tolist())
                examples.append({"row": i, "position": int(wrong[0]), "text": text})
    what = f"train on text that is not the assistant's ({tokens / max(1, trained):.0%} of their labels)"
    step = "correct the {% generation %} marks of the chat template" if assistant_only else ANSWERS_ALONE
    return finding(
        "foreign_text", "error" if assistant_only else "warning", foreign, len(looked) - len(untraceable), what, step,
        tokens=tokens, examples=examples,
    ) + _roles_unchecked(untraceable, len(talking), len(looked))  # fmt: skip


def trained_whole(rows: Any) -> list[Finding]:
    """That conversations without weights are trained whole, told by the first row; under ``assistant_only_loss`` they are not.

    Example:
        >>> (found,) = trained_whole([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
        >>> found.message.partition(":")[0]
        'conversations are trained whole, what users and systems say too'
    """
    first = next(iter(rows), {})
    if first.get("prompt") is not None or all(m.get("role") == "assistant" for m in conversation(first)):
        return []
    line = f"conversations are trained whole, what users and systems say too: {ANSWERS_ALONE}"
    return [Finding("foreign_text", "warning", len(rows), (), line)]


def _roles_unchecked(untraceable: Sequence[int], conversations: int, looked: int) -> list[Finding]:
    """Conversations about whose roles nothing is known: nobody looked, or their tokens tell nothing."""
    beyond = conversations - looked
    if not untraceable and not beyond:
        return []
    parts = [f"{beyond} are outside an even sample of {looked}"] if beyond else []
    if untraceable:
        parts.append(f"the tokens of {len(untraceable)} cannot be traced to their messages ({named(untraceable)})")
    count = len(untraceable) + beyond
    message = f"whose text {count} of {conversations} conversations train on was not checked: {' and '.join(parts)}"
    evidence = {"conversations": conversations, "untraceable": len(untraceable), "outside_sample": beyond}
    return [Finding("roles_unchecked", "info", count, tuple(untraceable[:ROWS_NAMED]), message, evidence)]


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All messages of a row, prompt and completion in one; empty for text and tokens."""
    if row.get("input_ids") is not None:
        return []
    if isinstance(row.get("prompt"), list):
        return [*row["prompt"], *(row.get("completion") or [])]
    return list(row.get("messages") or []) if not isinstance(row.get("prompt"), str) else []


def _owned_by_assistant(row: Mapping[str, Any], ids: np.ndarray, tokenizer: Any, template: str | None) -> Any:
    """For every token whether an assistant's message owns it, header included; None where the template does not tell."""
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    messages = [  # what has weight 0 is not trained on, whoever says it
        {**m, "weight": float(m.get("role") == "assistant" or m.get("weight") == 0)} for m in conversation(row)
    ]
    try:
        weights = message_token_weights(
            tokenizer, messages, ids.tolist(), chat_template=template, tools=tools,
            **(row.get("chat_template_kwargs") or {}),
        )  # fmt: skip
    except DataError:
        return None
    return np.array(weights) > 0
