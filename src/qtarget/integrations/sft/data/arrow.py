"""Columns of a data set as flat arrays, without a Python object a token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

BATCH = 1000
"""Rows at once."""


def list_batches(dataset: Dataset, *names: str) -> Iterator[tuple[np.ndarray, ...]]:
    """For each batch of rows the offsets ``[rows + 1]`` of the first column's lists, then the flat values of each column."""
    rows: Any = dataset.select_columns(list(names)).with_format("arrow")
    for table in rows.iter(BATCH):
        columns = [table[name].combine_chunks() for name in names]
        lengths = columns[0].value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        yield offsets, *(column.flatten().to_numpy(zero_copy_only=False) for column in columns)


def array_rows(dataset: Dataset, *names: str) -> Iterator[dict[str, np.ndarray]]:
    """Each row's lists in these columns."""
    rows: Any = dataset.select_columns(list(names)).with_format("arrow")
    for table in rows.iter(BATCH):
        parts = []
        for name in names:
            lists = table[name].combine_chunks()
            ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
            parts.append(np.split(lists.flatten().to_numpy(zero_copy_only=False), ends[:-1]))
        yield from (dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True))


def flat_lists(dataset: Dataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets ``[rows + 1]`` and flat values of a column of lists; a row without one counts as an empty list."""
    offsets, values = [np.zeros(1, np.int64)], []
    for starts, flat in list_batches(dataset, name):
        offsets.append(starts[1:] + offsets[-1][-1])
        values.append(flat)
    return np.concatenate(offsets), np.concatenate(values) if values else np.zeros(0, np.int64)


def list_array(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    """Lists of flat values."""
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), pa.array(values))


def with_columns(dataset: Dataset, made: Any, name: str) -> Dataset:
    """The data set with columns that ``made`` computes from batches of Arrow rows; those of the same name are replaced.

    Only the new columns are written, beside the old ones.

    Args:
        made: from a ``pyarrow.Table`` of rows to one of new columns.
        name: of what is made, part of the new columns' fingerprint.
    """
    columns = dataset.with_format("arrow").map(
        made, batched=True, batch_size=BATCH, remove_columns=dataset.column_names, load_from_cache_file=False, desc=name,
        new_fingerprint=Hasher.hash((dataset._fingerprint, name)),
    ).with_format(None)  # fmt: skip
    kept = [column for column in dataset.column_names if column not in columns.column_names]
    return concatenate_datasets([_plain(dataset.select_columns(kept)), columns], axis=1)


def _plain(dataset: Dataset) -> Dataset:
    """The rows as one table; a filter leaves a list of those that it kept, often all of them in their order.

    Joining columns (datasets 5.2) would write each column again for such a list, and again for the other data set.
    """
    if dataset._indices is None:
        return dataset
    if np.array_equal(dataset._indices.column(0).to_numpy(), np.arange(len(dataset.data))):
        return Dataset(dataset.data, dataset.info.copy(), dataset.split, fingerprint=dataset._fingerprint)
    return dataset.flatten_indices()
