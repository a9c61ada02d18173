"""Every row's pieces against what its tokens decode to, in batches and in as many processes as tokenising."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from qtarget.data.checks.audit import IGNORE_INDEX
from qtarget.data.checks.rendered import (
    Issue,
    Piece,
    calls_of,
    content_texts,
    excerpt,
    holds_null,
    losses,
    message_pieces,
    tool_pieces,
)
from qtarget.integrations.sft.data.columns import ROW
from qtarget.integrations.sft.rendering.renderer import Renderer, Row

BATCH = 500
GAP = "\0"
Feature = tuple[str, str, str, bool]
"""Kind (``content``, ``parts``, ``calls``, ``tools``), role, place (first, inner, last), whether it has calls."""
Features = dict[Feature, list[int]]
"""The rows that have a feature, as places in the data set."""


def scan(tokens: Dataset, renderer: Renderer, num_proc: int | None = None) -> tuple[list[Issue], Features]:
    """Look through all rows.

    Args:
        tokens: whole rows with ``input_ids``, ``labels``, their number, and the columns they were made of.
        num_proc: processes (``dataset_num_proc``).

    Returns:
        What is wrong with single rows, and which features of messages occur where, for ``probe_template``.
    """
    columns = [c for c in tokens.column_names if c not in ("weight", "loss_weights", "weight_spans")]
    data = tokens.select_columns(columns)
    look = partial(_look, renderer=renderer, strict_nulls=_strict_nulls(tokens))
    if num_proc and num_proc > 1 and len(data) > BATCH:
        rows: Any = data.map(
            look, batched=True, batch_size=BATCH, with_indices=True, num_proc=num_proc, remove_columns=columns,
            load_from_cache_file=False, new_fingerprint=f"scan{np.random.default_rng().integers(2**60):x}",
            desc="Checking rendered rows",
        )  # fmt: skip
        results = list(rows["found"])
    else:
        parts: Any = data.iter(BATCH)
        starts = range(0, len(data), BATCH)
        results = [look(part, range(at, at + BATCH))["found"][0] for at, part in zip(starts, parts, strict=True)]
    issues: list[Issue] = []
    features: Features = {}
    for result in map(json.loads, results):
        issues += [Issue(**issue) for issue in result["issues"]]
        for key, places in result["features"]:
            features.setdefault(tuple(key), []).extend(places)
    return issues, features


def _strict_nulls(tokens: Dataset) -> bool:
    """Whether a null in a nested object can be Arrow's own; ``Json`` columns keep each row's keys."""
    kinds = [str(tokens.features[c]) for c in ("messages", "prompt", "completion", "tools") if c in tokens.column_names]
    return any("Json" not in kind for kind in kinds)


def _look(batch: dict[str, list], places: Any, *, renderer: Renderer, strict_nulls: bool) -> dict[str, list[str]]:
    """One batch, as one line of JSON: Arrow has no type for what is found."""
    names = [name for name in batch if name not in ("input_ids", "labels")]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
    halves = _halves(batch["input_ids"], batch["labels"], renderer.tokenizer)
    issues: list[Issue] = []
    features: Features = {}
    for at, row, (trained, other, whole), ids in zip(places, rows, halves, batch["input_ids"], strict=False):
        messages = renderer.messages(row)
        issues += nulls(row, messages, strict_nulls)
        if is_empty_answer(row, messages, renderer.tokenizer.eos_token or ""):
            issues.append(Issue(row[ROW], "empty_answer", ""))
        for _, feature in enumerate_features(row, messages):
            features.setdefault(feature, []).append(at)
        missing = [p for p in pieces_of(row, messages, renderer) if not _arrives(p, trained, other, whole)]
        if missing:
            issues += _causes(row, ids, missing, (trained, other, whole), renderer)
    found = {"issues": [asdict(issue) for issue in issues], "features": [[list(k), v] for k, v in features.items()]}
    return {"found": [json.dumps(found)]}


def _halves(ids: list[list[int]], labels: list[list[int]], tokenizer: Any) -> Iterator[tuple[str, str, str]]:
    """Text that is trained, other text, and the whole, of each row."""
    parts: list[list[int]] = []
    kinds: list[list[bool]] = []
    for row_ids, row_labels in zip(ids, labels, strict=True):
        if IGNORE_INDEX not in row_labels:
            kinds.append([True])
            parts.append(row_ids)
            continue
        mask = np.asarray(row_labels) != IGNORE_INDEX
        borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)] if len(mask) else [0]
        kinds.append([bool(mask[a]) for a in borders[:-1]])
        parts += [row_ids[a:b] for a, b in itertools.pairwise(borders)]
    texts = iter(decode(tokenizer, parts))
    for row_kinds in kinds:
        spans = [next(texts) for _ in row_kinds]
        if row_kinds == [True]:
            yield spans[0], "", spans[0]
            continue
        trained = GAP.join(text for text, kind in zip(spans, row_kinds, strict=True) if kind)
        other = GAP.join(text for text, kind in zip(spans, row_kinds, strict=True) if not kind)
        yield trained, other, "".join(spans)


def decode(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    """Texts with their special tokens, nothing tidied up."""
    if not ids:
        return []
    if isinstance(
        tokenizer, PreTrainedTokenizerFast
    ):  # batch_decode looks at each id's type in Python (transformers 5.23)
        return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pieces_of(row: Row, messages: list[Row], renderer: Renderer) -> list[Piece]:
    """What must be found in a rendered row."""
    if not messages:
        if isinstance(row.get("prompt"), str):
            only = renderer.completion_only
            parts = (
                ("the prompt", row["prompt"], False if only else None),
                ("the completion", row["completion"], only or None),
            )
        else:
            parts = (("the text", row[renderer.text_field], None),)
        end = renderer.tokenizer.eos_token or ""  # which TRL appends
        stripped = ((where, text.removesuffix(end).strip(), trained) for where, text, trained in parts)
        return [Piece(where, (text,), trained) for where, text, trained in stripped if text]
    prompt = len(row["prompt"]) if isinstance(row.get("prompt"), list) else 0
    out = []
    for i, message in enumerate(messages):
        trained = None
        if renderer.assistant_only or (prompt and renderer.completion_only):
            trained = message.get("role") in ("assistant", "model") and (i >= prompt or not renderer.completion_only)
        out += message_pieces(message, trained)
    return [*out, *tool_pieces(renderer.options(row)["tools"])]


def _arrives(piece: Piece, trained: str, other: str, whole: str) -> bool:
    return piece.within(whole if piece.trained is None else trained if piece.trained else other)


def _causes(
    row: Row, ids: list[int], missing: list[Piece], halves: tuple[str, str, str], renderer: Renderer
) -> Iterator[Issue]:
    """Why pieces are not where they should be: the mask, the template, or the tokenizer."""
    number, rendered = row[ROW], renderer.text(row)
    exact = decode(renderer.tokenizer, [ids])[0]
    for piece in missing:
        text = piece.forms[0]
        if not piece.within(rendered):
            yield Issue(number, "reasoning_dropped" if piece.soft else "content_dropped", piece.where, excerpt(text))
        elif piece.within(halves[2]) or piece.within(exact):
            if piece.trained is None:
                continue
            boundary = piece.where == "the prompt"
            check = "untrained_answer" if piece.trained else "merged_boundary" if boundary else "foreign_text"
            yield Issue(number, check, piece.where, excerpt(text[-60:] if boundary else text))
        else:
            yield from _lost(number, piece, text, renderer.tokenizer)


def _lost(number: int, piece: Piece, text: str, tokenizer: Any) -> Iterator[Issue]:
    read = decode(tokenizer, [tokenizer(text, add_special_tokens=False)["input_ids"]])[0]
    if text in read:
        return  # alone it is kept whole; its first token merges with what stands before it
    lost, changed = losses(text, read)
    if lost:
        yield Issue(number, "text_lost", piece.where, excerpt(text), lost, len(text))
    else:
        yield Issue(number, "text_lost", changed or "the order of characters", excerpt(text))


def enumerate_features(row: Row, messages: list[Row]) -> Iterator[tuple[int, Feature]]:
    """What a template could treat in its own way, with the message that has it (-1: the row)."""
    for i, message in enumerate(messages):
        role, content = str(message.get("role")), message.get("content")
        place = "first" if i == 0 else "last" if i == len(messages) - 1 else "inner"
        calls = bool(calls_of(message))
        if calls:
            yield i, ("calls", role, place, True)
        if content:
            yield i, ("parts" if isinstance(content, list) else "content", role, place, calls)
    if row.get("tools"):
        yield -1, ("tools", "", "", False)


def is_empty_answer(row: Row, messages: list[Row], end: str) -> bool:
    """Whether the completion, or the last answer, has neither text nor a call; TRL appended the end token."""
    if not messages:
        return isinstance(row.get("prompt"), str) and not row["completion"].removesuffix(end).strip()
    answers = [message for message in messages if message.get("role") == "assistant"]
    content = answers[-1].get("content") if answers else None
    return isinstance(content, str) and not content.strip() and not calls_of(answers[-1])


def nulls(row: Row, messages: list[Row], strict: bool) -> Iterator[Issue]:
    """Messages without content, and nulls that Arrow may have put into nested objects (``strict``)."""
    number = row[ROW]
    for message in messages:
        calls = calls_of(message)
        content = message.get("content")
        thoughts = any(message.get(key) for key in ("reasoning_content", "reasoning", "thinking"))
        if content is None and not calls and not thoughts:
            yield Issue(number, "null_content", f"role {message.get('role')}")
        elif isinstance(content, list) and len(content_texts(content)) < len(content):
            yield Issue(
                number, "content_dropped", f"a part of {message.get('role')} that is no text", excerpt(str(content))
            )
        if strict and any(holds_null(call.get("arguments") or {}) for call in calls):
            yield Issue(number, "nested_nulls", "arguments of a call")
    if strict and isinstance(row.get("tools"), list) and holds_null(row["tools"]):
        yield Issue(number, "nested_nulls", "tools")
    options = row.get("chat_template_kwargs")
    if options is not None and isinstance(options, dict) and strict and holds_null(options):
        yield Issue(number, "nested_nulls", "chat_template_kwargs")
