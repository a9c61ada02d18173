"""Rows of a stream: prepared as they come, by the same steps as a whole data set without the checks that count rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import get_worker_info
from transformers.utils import logging
from trl.data_utils import pack_dataset

from qtarget.integrations.sft.data.columns import ROW_IDS
from qtarget.integrations.sft.data.weights import ROW, Weighting, prompt_weights, row_weights
from qtarget.integrations.sft.preparation import changed

logger = logging.get_logger(__name__)


def stream_rows(
    dataset: IterableDataset,
    name: str,
    *,
    trl: Callable[..., Any],
    args: Any,
    tokenizer: Any,
    chat_template: str | None,
    packing: bool,
    formatting_func: Any,
    completion_only: bool,
) -> IterableDataset:
    """``Preparation.prepare`` for a stream: ``input_ids``, ``labels``, ``ROW_IDS``, and ``loss_weights`` where rows have them.

    Args:
        trl: ``SFTTrainer._prepare_dataset`` of the trainer.
        chat_template: TRL's training template where it replaces the tokenizer's own.
        completion_only: as in ``Preparation.prepare``; rows of a stream are not checked against it.

    Raises:
        DataError: (while it is read) a weight that is none.
    """
    logger.warning(
        f"{name} data: a stream is not audited, counted or compared with other data before training; load it whole for that"
    )
    first = next(iter(dataset))
    if ROW_IDS in first:
        return dataset
    weighted = bool(Weighting.of(Dataset.from_list([first]))) or args.prompt_weight is not None
    keep_end = args.truncation_mode == "keep_end"
    cuts_rows = packing and args.packing_strategy != "bfd"
    whole = changed(args, max_length=None, shuffle_dataset=False)

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {ROW_IDS: [row[ROW]] * len(row["input_ids"])}
        if not weighted:
            return out
        weights = row_weights(row, tokenizer, chat_template) * prompt_weights(
            np.asarray(row["labels"]), args.prompt_weight
        )
        labels = {} if args.prompt_weight is None else {"labels": row["input_ids"]}
        return out | {"loss_weights": weights.tolist()} | labels

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        n = len(row["input_ids"])
        return {c: row[c][-n:] if keep_end else row[c][:n] for c in (ROW_IDS, "loss_weights") if c in row}

    rows = trl(dataset.map(numbered, with_indices=True), tokenizer, whole, False, formatting_func, name)
    rows = trl(rows.map(columns), tokenizer, whole if cuts_rows else args, False, None, name).map(cut)
    rows = rows.select_columns(["input_ids", "labels", ROW_IDS, *(["loss_weights"] if weighted else [])])
    if not packing:
        return rows
    rows = pack_dataset(rows, args.max_length, args.packing_strategy)
    return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows


def numbered(row: dict[str, Any], index: int) -> dict[str, Any]:
    """The row with its number; workers that read shards of their own take turns in the numbers."""
    worker: Any = get_worker_info()
    return {**row, ROW: index if worker is None else index * worker.num_workers + worker.id}
