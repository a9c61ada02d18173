"""Batches for a training loop of one's own: padded, with labels shifted as ``qtarget.target_loss`` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtarget.core.errors import DataError
from qtarget.data.checks.audit import IGNORE_INDEX


def collate(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, Tensor]:
    """Rows of tokens as one batch, padded on the right.

    A causal model's logits at position ``t`` are about the token at ``t + 1``. Labels are moved there, so that logits and
    labels of one position belong together; nothing is about the last position.

    Args:
        rows: ``input_ids`` each, and optionally ``labels`` and ``loss_weights`` of the same length: as tokenised, **not**
            shifted, -100 where a token is not trained on. Without labels every token but the first is trained on.
        pad_id: stands in ``input_ids`` behind a row; the mask hides it.

    Returns:
        ``input_ids`` and ``attention_mask``, ``[rows, time]``, for the model; ``labels``, and ``loss_weights`` where any row
        has them, ``[rows, time]``, for the loss. Weights are moved with their labels; a row without them weighs 1.

    Raises:
        DataError: there are no rows, a row is empty, or its columns have other lengths than its ids.

    Example:
        >>> batch = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6, 7], [8, 9, 0]], [[6, 7, -100], [9, -100, -100]])
        >>> batch["attention_mask"].tolist()
        [[1, 1, 1], [1, 1, 0]]
    """
    _check(rows)
    time = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": _padded([row["input_ids"] for row in rows], time, pad_id),
        "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], time, 0),
        "labels": _padded([row.get("labels", row["input_ids"])[1:] for row in rows], time, IGNORE_INDEX),
    }
    if any("loss_weights" in row for row in rows):
        weights = [row.get("loss_weights", [1.0] * len(row["input_ids"]))[1:] for row in rows]
        batch["loss_weights"] = _padded(weights, time, 0.0).float()
    return batch


def _padded(columns: Sequence[Any], time: int, filler: float) -> Tensor:
    return torch.tensor([[*column, *[filler] * (time - len(column))] for column in columns])


def _check(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        raise DataError("there are no rows to make a batch of; expected at least one")
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        if not length:
            raise DataError(f"row {i + 1} has no tokens; leave it out")
        for name in ("labels", "loss_weights"):
            if name in row and len(row[name]) != length:
                raise DataError(
                    f"row {i + 1} has {len(row[name])} {name} for {length} input_ids; expected one a token, not shifted"
                )
