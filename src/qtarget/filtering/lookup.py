"""Rows with what a cache says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtarget.filtering.evidence import ScoredRows
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum


def rows_in_cache(
    cache: ReferenceCache,
    ids: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    numbers: Sequence[int] | np.ndarray,
    alone: Sequence[np.ndarray] | None = None,
) -> ScoredRows:
    """Look up the base's numbers of rows.

    Args:
        cache: of the base.
        ids: ``[tokens]`` of each row, cut as training cuts them.
        trained: ``[tokens]`` booleans of each row, ``supervised_mask``; at least one true.
        numbers: each row's number in the user's data, which messages name.
        alone: ``[trained]`` log-probs of each answer without its prompt.

    Raises:
        CacheMismatchError: a row was never scored.
    """
    checksums = [row_checksum(row, mask) for row, mask in zip(ids, trained, strict=True)]  # pyright: ignore[reportArgumentType]
    found = [cache.row(place) for place in cache.locate(checksums, np.asarray(numbers))]
    entropy = [row["entropy"] for row in found] if "entropy" in cache.manifest.columns else None
    return ScoredRows.of(
        ids, trained, [row["label_log_probs"] for row in found], entropy, alone, np.asarray(numbers).tolist()
    )
