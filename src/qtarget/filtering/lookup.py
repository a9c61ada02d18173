"""Rows with what a cache says of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qtarget.filtering.copies import judge_copies, next_step
from qtarget.filtering.evidence import ScoredRows
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum
from qtarget.scoring.contradictions import read_side


def rows_in_cache(
    cache: ReferenceCache,
    ids: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    numbers: Sequence[int] | np.ndarray,
    alone: Sequence[np.ndarray] | None = None,
    witness: ReferenceCache | None = None,
    sided: bool = True,
) -> ScoredRows:
    """Look up the base's numbers of rows.

    Args:
        cache: of the base.
        ids: ``[tokens]`` of each row, cut as training cuts them.
        trained: ``[tokens]`` booleans of each row, ``supervised_mask``; at least one true.
        numbers: each row's number in the user's data, which messages name.
        alone: ``[trained]`` log-probs of each answer without its prompt.
        witness: of copies that have not seen the rows.
        sided: whether to read what lies beside the witness, which a signature does not cover.

    Raises:
        CacheMismatchError: a row was never scored, or what lies beside the witness is not its own.
    """
    checksums = [row_checksum(row, mask) for row, mask in zip(ids, trained, strict=True)]  # pyright: ignore[reportArgumentType]
    log_probs, entropy = _said(cache, checksums, numbers)
    told = (None, None) if witness is None else _said(witness, checksums, numbers)
    against = None if witness is None or not sided else read_side(witness.path, checksums)
    known = None if witness is None else judge_copies(witness, cache)
    step = "" if known is None or known.known or witness is None else next_step(known, witness)
    return ScoredRows.of(
        ids, trained, log_probs, entropy, alone, np.asarray(numbers).tolist(), *told, against, known, step
    )


def _said(
    cache: ReferenceCache, checksums: Sequence[str], numbers: Sequence[int] | np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Log-probs of each row's labels, and the entropy there if the cache has it."""
    found = [cache.row(place) for place in cache.locate(checksums, np.asarray(numbers))]
    entropy = [row["entropy"] for row in found] if "entropy" in cache.manifest.columns else None
    return [row["label_log_probs"] for row in found], entropy
