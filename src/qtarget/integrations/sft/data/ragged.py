"""Columns of lists, one a row, without a Python object an entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset


@dataclass(frozen=True)
class Ragged:
    """A column of lists without a Python object an entry.

    Attributes:
        values: ``[entries]`` of all rows, one after another.
        lengths: ``[rows]``.
    """

    values: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset, column: str) -> Ragged:
        """Read from Arrow, in the order of the rows."""
        tables: Any = dataset.select_columns([column]).with_format("arrow").iter(1000)
        parts = [table[column].combine_chunks() for table in tables]
        flat = [part.flatten().to_numpy(zero_copy_only=False) for part in parts]
        sizes = [part.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False) for part in parts]
        return cls(np.concatenate(flat), np.concatenate(sizes).astype(np.int64))

    @property
    def rows(self) -> np.ndarray:
        """``[entries]`` the row of each entry."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """``[rows]`` index of each row's first entry."""
        return np.concatenate([[0], np.cumsum(self.lengths)[:-1]]).astype(np.int64)

    def arrow(self, values: np.ndarray, keep: np.ndarray | None = None) -> pa.ListArray:
        """Values of these entries as a column of lists, those of ``keep`` alone."""
        lengths = self.lengths
        if keep is not None:
            lengths = np.bincount(self.rows[keep], minlength=len(lengths))
            values = values[keep]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
