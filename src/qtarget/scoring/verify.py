"""Is a cache whole, and does its model still say what it says?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qtarget.errors import CacheMismatchError, DataError
from qtarget.scoring.reader import ReferenceCache
from qtarget.scoring.rows import Row, ScoredRow, Source, read_row


def check_counts(cache: ReferenceCache) -> None:
    """Read every row and compare its tokens with the manifest (hashes are compared on opening).

    Raises:
        CacheMismatchError: another number of tokens, or numbers that are NaN.
    """
    tokens = 0
    for index in range(len(cache)):
        row = cache.row(index)
        tokens += len(next(iter(row.values())))
        for name, values in row.items():
            if np.isnan(values).any():
                raise CacheMismatchError(
                    f"{cache.path}: row {index} has NaN in {name}; score again into another folder"
                )
    if tokens != cache.manifest.tokens:
        raise CacheMismatchError(f"{cache.path} holds {tokens} tokens, its manifest says {cache.manifest.tokens}")


def rescore(
    cache: ReferenceCache, source: Source, rows: Sequence[Mapping[str, Any]], *, count: int = 16, seed: int = 0
) -> dict[str, float]:
    """Score a random sample of rows again.

    Args:
        rows: ``input_ids`` and ``labels`` each; those that the cache does not hold are passed over.
        count: rows in the sample, at most.

    Returns:
        The largest absolute difference a column, nats; of top-k log-probs, over ids that both list.

    Raises:
        DataError: no row is in the cache.
    """
    vocab_size, top_k = cache.manifest.vocab_size, cache.manifest.top_k
    sample: list[tuple[Row, int]] = []
    for i in np.random.default_rng(seed).permutation(len(rows)):
        row = read_row(rows[int(i)], int(i), vocab_size)
        if len(row.positions) and (index := int(cache.find([row.checksum])[0])) >= 0:
            sample.append((row, index))
        if len(sample) == count:
            break
    if not sample:
        raise DataError(f"none of the {len(rows)} rows is in {cache.path}; pass the config that it was scored with")
    found = source.score([row.input_ids for row, _ in sample], top_k, positions=[row.positions for row, _ in sample])
    largest: dict[str, float] = {}
    for (_, index), numbers in zip(sample, found, strict=True):
        for name, difference in differences(cache.row(index), numbers).items():
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def differences(stored: Mapping[str, np.ndarray], scored: ScoredRow) -> dict[str, float]:
    """Largest absolute difference of each column between a stored row and one scored now."""
    out: dict[str, float] = {}
    for name in ("label_log_probs", "entropy", "tail_log_mass"):
        now = getattr(scored, name)
        if name in stored and now is not None and len(now):
            out[name] = float(np.abs(stored[name].astype(np.float64) - now).max())
    if scored.topk_ids is not None and scored.topk_log_probs is not None and "topk_ids" in stored:
        same = stored["topk_ids"][:, :, None] == scored.topk_ids[:, None, :]
        gap = np.abs(stored["topk_log_probs"].astype(np.float64)[:, :, None] - scored.topk_log_probs[:, None, :])
        out["topk_log_probs"] = float(gap[same].max(initial=0.0))
        out["topk_ids_missing_share"] = float(1 - same.any(-1).mean()) if same.size else 0.0
    return out
