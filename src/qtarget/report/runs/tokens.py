"""What changed between two scorings of the same rows, token by token; and the scoring of rows by a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qtarget.core.errors import DataError
from qtarget.scoring.cache.rows import read_row
from qtarget.scoring.sources.local import LocalSource

EXTREMES = 20
"""How many of the largest gains and losses are listed."""
ROWS_SHOWN = 100
"""How many rows a report holds token by token; means are over all."""
CONTEXT = 8
"""Tokens before a listed one that are quoted."""


def token_changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Log-prob of every trained token of the rows in both scorings.

    Args:
        before, after: rows with ``row``, ``input_ids``, ``tokens``, ``log_probs`` (None where not trained on) and
            optionally ``label_weights``.

    Returns:
        ``nll_before``, ``nll_after`` (nats a token, over all trained tokens of the common rows), ``token_count``,
        ``gains`` and ``losses`` (largest first), and up to 100 ``rows`` with ``before``, ``after`` and weights.

    Raises:
        DataError: no row is in both with the same tokens.
    """
    earlier = {row["row"]: row for row in before}
    pairs = [
        (earlier[row["row"]], row)
        for row in after
        if row["row"] in earlier and earlier[row["row"]]["input_ids"] == row["input_ids"]
    ]
    changes: list[dict[str, Any]] = []
    for old, new in pairs:
        for t, (a, b) in enumerate(zip(old["log_probs"], new["log_probs"], strict=True)):
            if a is not None and b is not None:
                changes.append({"row": new["row"], "position": t, "before": a, "after": b, "change": b - a})
    if not changes:
        raise DataError("the two scorings have no trained token in common; were they made of different rows?")
    ordered = sorted(changes, key=lambda one: -one["change"])
    rows = {new["row"]: new for _, new in pairs}
    return {
        "row_count": len(pairs),
        "token_count": len(changes),
        "nll_before": -fmean(one["before"] for one in changes),
        "nll_after": -fmean(one["after"] for one in changes),
        "gains": [_quoted(one, rows) for one in ordered[:EXTREMES] if one["change"] > 0],
        "losses": [_quoted(one, rows) for one in reversed(ordered[-EXTREMES:]) if one["change"] < 0],
        "rows": [_side_by_side(old, new) for old, new in pairs[:ROWS_SHOWN]],
    }


def _quoted(change: Mapping[str, Any], rows: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    tokens, t = rows[change["row"]]["tokens"], change["position"]
    return {**change, "token": tokens[t], "context": "".join(tokens[max(0, t - CONTEXT) : t])}


def _side_by_side(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    none = [None] * len(new["tokens"])
    return {
        "row": new["row"],
        "tokens": new["tokens"],
        "before": old["log_probs"],
        "after": new["log_probs"],
        "weight_before": old.get("label_weights", none),
        "weight_after": new.get("label_weights", none),
    }


def scored_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> list[dict[str, Any]]:
    """Rows as ``token_changes`` takes them, scored by a model in this process.

    Args:
        rows: ``input_ids`` and ``labels`` each, unshifted, -100 where not trained on.

    Raises:
        DataError, UnsupportedModelError: see ``read_row`` and ``LocalSource``.
    """
    source = LocalSource(model, logit_scale=logit_scale, logit_softcap=logit_softcap)
    read = [read_row(row, i, source.vocab_size) for i, row in enumerate(rows)]
    found = source.score([row.input_ids for row in read], 0, positions=[row.positions for row in read])
    out = []
    for i, (row, scored) in enumerate(zip(read, found, strict=True)):
        log_probs: list[float | None] = [None] * len(row.input_ids)
        for place, value in zip(row.positions.tolist(), scored.label_log_probs.tolist(), strict=True):
            log_probs[place] = value
        ids = row.input_ids.tolist()
        out.append({"row": i, "input_ids": ids, "tokens": [tokenizer.decode([t]) for t in ids], "log_probs": log_probs})
    return out
