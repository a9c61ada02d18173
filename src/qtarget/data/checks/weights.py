"""Checks of what rows say of their weights, as the user wrote it: no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.checks.findings import ROWS_NAMED, Finding, named
from qtarget.data.columns import parsed_weight, row_loss_weights
from qtarget.data.spans import conversation_of, marked_texts


def check_weights(rows: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Rows whose ``weight``, ``loss_weights`` or ``weight_spans`` are no such thing: training stops at the first of them.

    Example:
        >>> [(found.check, found.rows) for found in check_weights([{"text": "a"}, {"text": "b", "weight": -1}])]
        [('unusable_weights', (1,))]
    """
    causes = {i: cause for i, row in enumerate(rows) if (cause := _cause(row)) is not None}
    if not causes:
        return []
    wrong = list(causes)
    message = (
        f"{len(wrong)} of {len(rows)} rows have weights that cannot be used: {named(wrong)}; row {wrong[0] + 1}: "
        f"{causes[wrong[0]]}"
    )
    return [Finding("unusable_weights", "error", len(wrong), tuple(wrong[:ROWS_NAMED]), message)]


def _cause(row: Mapping[str, Any]) -> str | None:
    try:
        parsed_weight(row.get("weight"), "weight")
        for i, message in enumerate(conversation_of(row)):
            parsed_weight(message.get("weight"), f"the weight of message {i} ({message.get('role')})")
        marked_texts(row)
        if row.get("loss_weights") is not None and row.get("input_ids") is not None:
            row_loss_weights(row, len(row["input_ids"]))
    except DataError as error:
        return str(error)
    return None
