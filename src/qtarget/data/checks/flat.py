"""Tokenised rows as three arrays, so that a check is a few operations on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qtarget.data.checks.audit import IGNORE_INDEX


@dataclass(frozen=True)
class FlatRows:
    """Tokens of all rows, one row after another.

    Attributes:
        ids: ``[tokens]``.
        labels: ``[tokens]``, not shifted, -100 ignored.
        lengths: ``[rows]`` tokens of each.
    """

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]] | FlatRows) -> FlatRows:
        """Of rows with ``input_ids`` and ``labels`` each.

        Example:
            >>> FlatRows.of([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}]).trained.tolist()
            [False, True, False]
        """
        if isinstance(rows, FlatRows):
            return rows
        none = [np.zeros(0, dtype=np.int64)]
        ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        labels = [np.asarray(row["labels"], dtype=np.int64) for row in rows]
        return cls(
            np.concatenate(ids or none), np.concatenate(labels or none), np.array([*map(len, ids)], dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def rows(self) -> np.ndarray:
        """``[tokens]`` the row of each."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """``[rows]`` index of each row's first token."""
        return (np.cumsum(self.lengths) - self.lengths).astype(np.int64)

    @cached_property
    def trained(self) -> np.ndarray:
        """``[tokens]`` whether the token has a label that some token predicts."""
        out = self.labels != IGNORE_INDEX
        out[self.starts[self.lengths > 0]] = False
        return out

    @cached_property
    def trained_counts(self) -> np.ndarray:
        """``[rows]`` of these."""
        return self.count(self.trained)

    def count(self, where: np.ndarray) -> np.ndarray:
        """``[rows]`` how many of a row's tokens a mask ``[tokens]`` holds."""
        return np.bincount(self.rows[where], minlength=len(self.lengths))

    def last_trained(self, window: int) -> np.ndarray:
        """``[tokens]`` whether the token is among the last so many trained ones of its row."""
        seen = np.cumsum(self.trained)
        of_row = np.concatenate([[0], seen])[self.starts + self.lengths]
        return self.trained & (of_row[self.rows] - seen < window)

    def row(self, i: int) -> slice:
        """Where a row's tokens are."""
        return slice(int(self.starts[i]), int(self.starts[i] + self.lengths[i]))
