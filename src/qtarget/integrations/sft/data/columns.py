"""Per-token columns of training rows: row ids, weights and cache positions stay with their tokens.

TRL tokenises, builds labels, truncates and packs; these columns go through the same packing, so that a padded and a
packed batch look up the same numbers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers.utils import logging

from qtarget.core.errors import CacheMismatchError, DataError, counted, inflected
from qtarget.core.types import DATA_FIELDS
from qtarget.data.checks.findings import named
from qtarget.data.fields import PRIVATE
from qtarget.integrations.sft.data.arrow import list_array, list_batches, with_columns
from qtarget.integrations.sft.data.weights import ROW, TokenWeights
from qtarget.integrations.shared.step import ROLES
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum

logger = logging.get_logger(__name__)

DATA_COLUMNS = tuple(f"{role}_{field}" for role in ROLES for field in DATA_FIELDS)
"""What the other rows say of a token, counted against one frozen model."""
ROW_IDS = f"{PRIVATE}row_ids"
"""That number once a token; rows that have it are prepared."""
TOKEN_COLUMNS = (ROW_IDS, "loss_weights", "reference_rows", "teacher_rows", *DATA_COLUMNS)
"""Per-token columns beside ``input_ids`` and ``labels``; a row's id or cache row is repeated for each token."""


def with_row_ids(dataset: Dataset) -> Dataset:
    """Number the rows of the user's data; every later message names rows by these numbers."""
    if ROW in dataset.column_names:
        return dataset
    return dataset.add_column(ROW, list(range(len(dataset))))  # pyright: ignore[reportCallIssue]


def with_token_columns(
    dataset: Dataset, weights: TokenWeights | None, *, keep_end: bool, all_tokens: bool = False
) -> Dataset:
    """Add ``ROW_IDS`` and, where there are weights, ``loss_weights``, as long as truncation left ``input_ids``.

    Args:
        dataset: tokenised rows, numbered.
        weights: of the same rows before truncation.
        keep_end: whether truncation kept the last tokens.
        all_tokens: labels at every token, whatever was masked.
    """
    places = {} if weights is None else dict(zip(weights.numbers.tolist(), range(len(weights.numbers)), strict=True))

    def columns(table: pa.Table) -> pa.Table:
        ids = table["input_ids"].combine_chunks()
        lengths = ids.value_lengths().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        numbers = table[ROW].to_numpy()
        out = {ROW_IDS: list_array(offsets, np.repeat(numbers, lengths))}
        if weights is not None:
            rows = np.array([places[n] for n in numbers.tolist()], dtype=np.int64)
            starts = weights.offsets[rows + 1] - lengths if keep_end else weights.offsets[rows]
            index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
            out["loss_weights"] = list_array(offsets, weights.values[index])
        if all_tokens:
            out["labels"] = table["input_ids"]
        return pa.table(out)

    return with_columns(dataset, columns, "Numbering tokens")


def trained_rows(dataset: Dataset, weights: TokenWeights, *, zero_masks: bool, name: str) -> Dataset:
    """The rows to train on: their spans are placed and, where weight 0 is a mask, a token that is trained weighs more.

    Raises:
        DataError: no row is left.
    """
    numbers = np.asarray(dataset[ROW][:])
    placed = ~np.isin(numbers, weights.numbers[weights.unplaced])
    kept = placed & (_weighs(dataset) if zero_masks else True)
    if not kept.any():
        raise DataError(nothing_weighs(name))
    if not kept.all():
        left_out = numbers[placed & ~kept]
        if len(left_out):
            logger.warning(
                f"{name} data: {counted(len(left_out), 'row')} of weight 0 {inflected(len(left_out), 'are')} left out "
                f"({named(left_out.tolist())})"
            )
        return dataset.select(np.flatnonzero(kept))
    return dataset


def nothing_weighs(name: str) -> str:
    """That no token of a data set is left to train on, in words."""
    return (
        f"every trained token of the {name} data has weight 0, so there is nothing to train on; check `weight`, "
        "`loss_weights` and `weight_spans`"
    )


def _weighs(dataset: Dataset) -> np.ndarray:
    """``[rows]`` whether a row has a supervised token of a weight above 0."""
    found = []
    for offsets, labels, weights in list_batches(dataset, "labels", "loss_weights"):
        counts = np.concatenate([[0], np.cumsum(supervised(offsets, labels) & (weights > 0))])
        found.append(counts[offsets[1:]] > counts[offsets[:-1]])
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)


def supervised(offsets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``supervised_mask`` of flat rows: nothing predicts the first token of a row."""
    mask = labels != -100
    mask[offsets[:-1][np.diff(offsets) > 0]] = False
    return mask


def locate_rows(dataset: Dataset, cache: ReferenceCache, role: str, dataset_name: str) -> Dataset:
    """Add the cache row of every data row, found by the checksum of its tokens and mask.

    Raises:
        CacheMismatchError: a row was never scored; names the rows and the command.
    """
    checksums = []
    for offsets, ids, labels in list_batches(dataset, "input_ids", "labels"):
        mask = supervised(offsets, labels)
        checksums += [row_checksum(ids[a:b], mask[a:b]) for a, b in pairwise(offsets.tolist())]  # pyright: ignore[reportArgumentType]
    try:
        numbers = dataset[ROW][:]  # rows of weight 0 are left out already, so places would name other rows
        found = dict(zip(numbers, cache.locate(checksums, numbers), strict=True))
    except CacheMismatchError as error:
        raise CacheMismatchError(f"{role} cache, {dataset_name} data: {error}") from error

    def column(table: pa.Table) -> pa.Table:
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        places = np.array([found[number] for number in table[ROW].to_pylist()], dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return pa.table({f"{role}_rows": list_array(offsets, np.repeat(places, lengths))})

    return with_columns(dataset, column, f"Locating {role} rows")
