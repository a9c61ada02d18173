"""A few evaluation rows with the numbers that evaluation computes anyway, and what identifies a data set."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from datasets import Dataset

from qtarget.core.shapes import Tensor
from qtarget.integrations.shared.step import TargetOutput, TargetStep


class RowSamples:
    """The first rows that this process meets in an evaluation: no forward pass of their own.

    Evaluation reads rows in one order, so they are the same rows each time. A row that packing cut apart is shown as far
    as its first piece goes.

    Args:
        count: how many rows; 0 for none.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: dict[int, dict[str, Any]] = {}

    def add(self, input_ids: Tensor, output: TargetOutput, step: TargetStep) -> None:
        """Look through one evaluation batch, ``[batch, time]``, for rows not yet met."""
        if len(self._rows) >= self._count or step.sequence_ids is None:
            return
        ids = step.sequence_ids.cpu()
        for b in range(len(ids)):
            for row in dict.fromkeys(ids[b].tolist()):
                if row >= 0 and row not in self._rows and len(self._rows) < self._count:
                    self._rows[row] = _sample(row, b, ids[b] == row, input_ids, output, step)

    def flush(self) -> list[dict[str, Any]]:
        """The rows, in the order met, and start again.

        Each has ``row`` (its number in the data), ``input_ids``, ``log_probs`` (nats) and ``label_weights``, one a token,
        None where not trained on.
        """
        rows, self._rows = list(self._rows.values()), {}
        return rows


def _sample(row: int, b: int, mine: Tensor, input_ids: Tensor, output: TargetOutput, step: TargetStep) -> dict:
    assert output.label_log_probs is not None and output.label_weights is not None
    supervised = (step.labels[b].cpu() != -100).tolist()
    numbers = {
        "log_probs": output.label_log_probs[b].detach().float().cpu().tolist(),
        "label_weights": output.label_weights[b].detach().float().cpu().tolist(),
    }
    places = mine.nonzero()[:, 0].tolist()
    # numbers are shifted: entry t - 1 is about the token at t, and nothing predicts the first one of a batch row
    columns = {
        name: [values[t - 1] if t and supervised[t] else None for t in places] for name, values in numbers.items()
    }
    return {"row": row, "input_ids": input_ids[b].cpu()[mine].tolist(), **columns}


def with_text(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows with ``tokens``, the text of each id by itself."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return [{**row, "tokens": [tokenizer.decode([i]) for i in row["input_ids"]]} for row in rows]


def describe_rows(dataset: Dataset, *, zero_masks: bool = False) -> dict[str, Any]:
    """Rows, tokens, supervised tokens, and a BLAKE2b over ids and masks in their order, of a tokenised data set.

    Args:
        zero_masks: whether labels of weight 0 are not trained on; the digest is of the labels as they came.
    """
    state, tokens, supervised = hashlib.blake2b(digest_size=16), 0, 0
    weighs = zero_masks and "loss_weights" in dataset.column_names
    columns = ["input_ids", "labels", *(["loss_weights"] if weighs else [])]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(1000):
        table: Any = batch
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        mask = labels.flatten().to_numpy(zero_copy_only=False) != -100
        # lengths too: ids alone do not tell where a row ends
        for part in (ids.value_lengths(), ids.flatten()):
            state.update(part.to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        state.update(mask.tobytes())
        if weighs:
            mask &= table["loss_weights"].combine_chunks().flatten().to_numpy(zero_copy_only=False) != 0
        tokens, supervised = tokens + len(mask), supervised + int(np.count_nonzero(mask))
    return {
        "rows": len(dataset),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "fingerprint": state.hexdigest(),
    }
