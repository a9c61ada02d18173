"""What an audit says of weights, from the functions at which training stops."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.checks.findings import Finding, finding
from qtarget.data.checks.weights import check_weights as check_rows
from qtarget.integrations.sft.data.arrow import flat_lists
from qtarget.integrations.sft.data.columns import nothing_weighs, supervised
from qtarget.integrations.sft.data.weights import ROW, TokenWeights, announcement, check_weights, weights_of_rows


def weight_findings(
    rows: Dataset, tokens: Dataset | None, tokenizer: Any, chat_template: str | None, args: Any
) -> list[Finding]:
    """Weights at which training would stop, rows that it would leave out, and the weights in words.

    Args:
        rows: numbered, as the user wrote them.
        tokens: of the same rows, not cut; None where TRL stops.
        args: a ``QTargetConfig``.
    """
    raw: Any = rows
    if found := check_rows(list(raw)):
        return found
    try:
        check_weights(rows, args.build_target(), args)
        weights = None if tokens is None else weights_of_rows(tokens, tokenizer, chat_template, args)
    except (ConfigError, DataError) as error:
        return [Finding("unusable_weights", "error", len(rows), (), str(error))]
    if tokens is None or weights is None:
        return []
    said = announcement(tokens, weights, args.prompt_weight)
    return [Finding("weights", "info", len(tokens), (), line) for line in said] + _left_out(tokens, weights, args)


def _left_out(tokens: Dataset, weights: TokenWeights, args: Any) -> list[Finding]:
    before, after = _trained(tokens, weights, args)
    numbers = np.asarray(tokens[ROW][:])
    step = "take their weight_spans away, or weigh their tokens with `loss_weights`"
    unplaced = numbers[weights.unplaced].tolist()
    found = finding("unplaced_spans", "warning", unplaced, len(numbers), "have spans in none of their tokens", step)
    if args.weights_scale == "label":
        return found
    after &= ~weights.unplaced
    if before.any() and not after.any():
        return [*found, Finding("weightless", "error", len(numbers), (), nothing_weighs("train"))]
    rows = numbers[before & ~after & ~weights.unplaced].tolist()
    return found + finding(
        "weightless", "info", rows, len(numbers), "have weight 0 and are left out", "give them weight if not meant"
    )


def _trained(tokens: Dataset, weights: TokenWeights, args: Any) -> tuple[np.ndarray, np.ndarray]:
    """``[rows]`` twice: whether a row has a label after truncation, and whether one of a weight above 0."""
    offsets, labels = flat_lists(tokens, "labels")
    lengths = np.diff(offsets)
    place = np.arange(len(labels)) - np.repeat(offsets[:-1], lengths)
    if args.truncation_mode == "keep_end":
        place = np.repeat(lengths, lengths) - 1 - place
    kept = place < (args.max_length or len(labels))
    short = np.minimum(lengths, args.max_length or len(labels))
    given = np.zeros_like(labels) if args.prompt_weight is not None else labels
    mask = supervised(np.concatenate([[0], np.cumsum(short)]), given[kept])
    rows = np.repeat(np.arange(len(lengths)), short)
    counts = [np.bincount(rows[m], minlength=len(lengths)) for m in (mask, mask & (weights.values[kept] > 0))]
    return counts[0] > 0, counts[1] > 0
