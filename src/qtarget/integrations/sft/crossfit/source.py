"""Many judges as one source: each row is scored by the model of its fold, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qtarget.core.errors import DataError
from qtarget.scoring.cache.rows import IntArray, ScoredRow, check_request
from qtarget.scoring.cache.schema import row_checksum
from qtarget.scoring.sources.local import LocalSource


class CrossfitSource:
    """A source that asks another model for the rows of each fold.

    Args:
        folds: the fold of each row, by ``row_checksum``.
        judge: gives the source of a fold; the one before it is let go first.
        vocab_size: rows of the models' head.
    """

    def __init__(self, folds: Mapping[str, int], judge: Callable[[int], LocalSource], vocab_size: int) -> None:
        self._folds, self._judge, self._vocab_size = folds, judge, vocab_size
        self._fold, self._source = -1, None

    @property
    def vocab_size(self) -> int:
        """Rows of the head, the same of all copies."""
        return self._vocab_size

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``.

        Raises:
            DataError: a row that is in no fold, or see ``check_request``.
        """
        ids, places = check_request(token_ids, top_k, candidate_ids, positions, self._vocab_size)
        return self._routed(
            ids, places, lambda source, i, at: source.score(pick(ids, i), top_k, candidate_ids, positions=at)
        )

    def sample(
        self, token_ids: Sequence[IntArray], uniforms: Sequence[np.ndarray], *, positions: Sequence[IntArray]
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.cache.rows.SamplingSource``; raises as ``score``."""
        ids, places = check_request(token_ids, 0, None, positions, self._vocab_size)
        return self._routed(
            ids, places, lambda source, i, at: source.sample(pick(ids, i), pick(uniforms, i), positions=at)
        )

    def _routed(
        self,
        ids: list[np.ndarray],
        places: list[np.ndarray],
        ask: Callable[[LocalSource, list[int], list[np.ndarray]], list[ScoredRow]],
    ) -> list[ScoredRow]:
        folds = [self._fold_of(row, at) for row, at in zip(ids, places, strict=True)]
        out: dict[int, ScoredRow] = {}
        for fold in sorted(set(folds)):
            members = [i for i, other in enumerate(folds) if other == fold]
            out |= zip(members, ask(self._of(fold), members, pick(places, members)), strict=True)
        return [out[i] for i in range(len(folds))]

    def _fold_of(self, row: np.ndarray, places: np.ndarray) -> int:
        mask = np.zeros(len(row), dtype=bool)
        mask[places] = True
        checksum = row_checksum(row, mask)  # pyright: ignore[reportArgumentType]
        if checksum not in self._folds:
            raise DataError(
                f"row {checksum} is in none of the {len(set(self._folds.values()))} folds, so nobody may judge it; score the "
                "rows that were dealt"
            )
        return self._folds[checksum]

    def _of(self, fold: int) -> LocalSource:
        if self._source is None or fold != self._fold:
            self._source = None  # before the next one is loaded
            self._source, self._fold = self._judge(fold), fold
        return self._source


def pick(values: Sequence[Any], index: Sequence[int]) -> list[Any]:
    """Those entries."""
    return [values[i] for i in index]
