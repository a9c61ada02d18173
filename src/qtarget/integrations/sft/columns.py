"""Per-token columns of training rows: row ids, weights and cache positions stay with their tokens.

TRL tokenises, builds labels, truncates and packs; these columns go through the same packing, so that a padded and a
packed batch look up the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from qtarget.core.errors import CacheMismatchError, DataError
from qtarget.core.types import DATA_FIELDS
from qtarget.data.agreement import confident_choices, counted_fields
from qtarget.data.columns import message_token_weights, row_loss_weights
from qtarget.integrations.shared.step import ROLES
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask

logger = logging.get_logger(__name__)

DATA_COLUMNS = tuple(f"{role}_{field}" for role in ROLES for field in DATA_FIELDS)
"""What the other rows say of a token, counted against one frozen model."""
TOKEN_COLUMNS = ("row_ids", "loss_weights", "reference_rows", "teacher_rows", *DATA_COLUMNS)
"""Per-token columns beside ``input_ids`` and ``labels``; a row's id or cache row is repeated for each token."""


ROW = "qtarget_row"
"""Reserved column: the row's number in the user's data, whatever ids the data has of its own."""


def with_row_ids(dataset: Dataset) -> Dataset:
    """Number the rows of the user's data; every later message names rows by these numbers."""
    if ROW in dataset.column_names:
        return dataset
    return dataset.add_column(ROW, list(range(len(dataset))))  # pyright: ignore[reportCallIssue]


def has_weights(dataset: Dataset) -> bool:
    """Whether any row carries a ``weight``, a message ``weight`` or ``loss_weights``."""
    if "loss_weights" in dataset.column_names or "weight" in dataset.column_names:
        return True
    conversations = [c for c in ("messages", "prompt", "completion") if c in dataset.column_names]
    return any("weight" in message for c in conversations for value in dataset[c] for message in _first_messages(value))


def _first_messages(value: Any) -> list[dict[str, Any]]:
    return [m for m in value if isinstance(m, dict)] if isinstance(value, list) else []


def token_weights(row: dict[str, Any], tokenizer: Any, chat_template: str | None) -> list[float]:
    """The factor on each token's label weight: row ``weight`` x message ``weight`` x ``loss_weights``.

    Raises:
        DataError: a weight is negative or not a number, or ``loss_weights`` has another length than the tokens.
    """
    length = len(row["input_ids"])
    weights = [1.0] * length
    messages = row.get("messages") or [*_first_messages(row.get("prompt")), *_first_messages(row.get("completion"))]
    if messages and any(m.get("weight") is not None for m in messages):
        tools = row.get("tools")
        weights = message_token_weights(
            tokenizer,
            messages,
            row["input_ids"],
            chat_template=chat_template,
            tools=json.loads(tools) if isinstance(tools, str) else tools,
            **(row.get("chat_template_kwargs") or {}),
        )
    if row.get("loss_weights") is not None:
        weights = [a * b for a, b in zip(weights, row_loss_weights(row, length), strict=True)]
    whole = row.get("weight")
    if whole is None:
        return weights
    if not isinstance(whole, int | float) or not 0 <= whole < float("inf"):
        raise DataError(f"row {row[ROW]}: weight={whole!r}; expected a finite number of at least 0")
    return [w * whole for w in weights]


def add_token_columns(dataset: Dataset, tokenizer: Any, chat_template: str | None) -> Dataset:
    """Add ``row_ids`` and, where the data has weights, ``loss_weights``, as long as the untruncated tokens."""
    weighted = has_weights(dataset)

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {"row_ids": [row[ROW]] * len(row["input_ids"])}
        if weighted:
            out["loss_weights"] = token_weights(row, tokenizer, chat_template)
        return out

    return dataset.map(columns, desc="Numbering tokens")


def cut_to_tokens(dataset: Dataset, keep_end: bool) -> Dataset:
    """Cut the added columns to the length that truncation left of ``input_ids``."""
    columns = [c for c in TOKEN_COLUMNS if c in dataset.column_names]

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        n = len(row["input_ids"])
        return {c: row[c][-n:] if keep_end else row[c][:n] for c in columns}

    rows: Any = dataset
    if all(len(row["row_ids"]) == len(row["input_ids"]) for row in rows):
        return dataset
    return dataset.map(cut, desc="Truncating token columns")


def locate_rows(dataset: Dataset, cache: ReferenceCache, role: str, dataset_name: str) -> Dataset:
    """Add the cache row of every data row, found by the checksum of its tokens and mask.

    Raises:
        CacheMismatchError: a row was never scored; names the rows and the command.
    """
    rows: list[Any] = list(dataset)
    checksums = [row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in rows]
    try:
        found = cache.locate(checksums)
    except CacheMismatchError as error:
        raise CacheMismatchError(f"{role} cache, {dataset_name} data: {error}") from error
    column = [[index] * len(row["input_ids"]) for index, row in zip(found, rows, strict=True)]
    return dataset.add_column(f"{role}_rows", column)  # pyright: ignore[reportCallIssue]


def add_data_columns(dataset: Dataset, cache: ReferenceCache, role: str, fields: frozenset[str]) -> Dataset:
    """Add what the rows say of one another (``DATA_FIELDS``), counted within this data set; 0 where not trained on.

    Args:
        dataset: located rows, not packed yet.
        fields: which of ``DATA_FIELDS`` the target needs of this role; nothing is counted without.
    """
    if not fields & set(DATA_FIELDS):
        return dataset
    rows: list[Any] = list(dataset)
    ids, masks = [row["input_ids"] for row in rows], [supervised_mask(row["labels"]) for row in rows]
    known, said = [], []
    for row in rows:
        numbers = cache.row(row[f"{role}_rows"][0])
        known.append(numbers["label_log_probs"])
        if cache.has_topk:
            said.append(confident_choices(numbers["topk_ids"], numbers["topk_log_probs"]))
    found = counted_fields(ids, masks, known, fields, said if cache.has_topk else None)
    if "reliability" in found:
        mean = float(np.concatenate(found["reliability"]).mean())
        logger.warning(f"{role}: reliability of the frozen model, mean over the trained tokens: {mean:.2f}")
    for name, values_of_rows in sorted(found.items()):
        column = [_spread(values, mask) for values, mask in zip(values_of_rows, masks, strict=True)]
        dataset = dataset.add_column(f"{role}_{name}", column)  # pyright: ignore[reportCallIssue]
    return dataset


def _spread(values: Any, mask: Sequence[bool]) -> list[float]:
    out = np.zeros(len(mask), dtype=np.float32)
    out[np.asarray(mask, dtype=bool)] = values
    return out.tolist()
