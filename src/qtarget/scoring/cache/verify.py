"""Is a cache whole, and does its model still say what it says?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from qtarget.core.errors import CacheMismatchError, DataError
from qtarget.scoring.cache.columns import KEPT_BITS, LOWEST
from qtarget.scoring.cache.decoded import check_side_file
from qtarget.scoring.cache.plan import PLAN
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import Row, ScoredRow, Source, read_row
from qtarget.scoring.cache.schema import MANIFEST, Provenance


def check_counts(cache: ReferenceCache) -> None:
    """Read every row and compare its tokens with the manifest (hashes are compared on opening).

    Raises:
        CacheMismatchError: another number of tokens, numbers that are NaN, ids outside the vocabulary, or decoded numbers that are
            not those of the manifest.
    """
    for shard in cache.manifest.shards:
        check_side_file(cache.path, shard, cache.manifest)
    tokens = 0
    for index in range(len(cache)):
        row = cache.row(index)
        tokens += len(next(iter(row.values())))
        ids = row.get("topk_ids", np.zeros(0, np.int32))
        if ids.size and not (ids.min() >= -1 and ids.max() < cache.manifest.vocab_size):
            raise CacheMismatchError(
                f"{cache.path}: row {index} lists ids from {ids.min()} to {ids.max()}, expected 0 to "
                f"{cache.manifest.vocab_size - 1}; score again into another folder"
            )
        for name, values in row.items():
            if np.isnan(values).any():
                raise CacheMismatchError(
                    f"{cache.path}: row {index} has NaN in {name}; score again into another folder"
                )
    if tokens != cache.manifest.tokens:
        raise CacheMismatchError(f"{cache.path} holds {tokens} tokens, its manifest says {cache.manifest.tokens}")


def check_plan(cache: ReferenceCache) -> None:
    """Compare the manifest with the plan that its scorer began with; merged caches have none.

    Raises:
        CacheMismatchError: one of them was edited, or the plan is unreadable.
    """
    path = cache.path / PLAN
    if not path.exists():
        return
    redo = f"delete {cache.path / MANIFEST} and run the command that wrote it again: finished shards are kept"
    try:
        plan = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CacheMismatchError(f"{path} is unreadable ({error}); score again into another folder") from error
    said = asdict(cache.manifest)
    edited = [
        f"{field.name} is {said[field.name]!r} in {MANIFEST}, {plan[field.name]!r} in {PLAN}"
        for field in fields(Provenance)
        if field.name in plan and plan[field.name] != said[field.name]
    ]
    if edited:
        raise CacheMismatchError(f"{cache.path} was edited: {'; '.join(edited)}; expected the same in both; {redo}")


def rescore(
    cache: ReferenceCache, source: Source, rows: Sequence[Mapping[str, Any]], *, count: int = 16, seed: int = 0
) -> dict[str, float]:
    """Score a random sample of rows again.

    Args:
        rows: ``input_ids`` and ``labels`` each; those that the cache does not hold are passed over.
        count: rows in the sample, at most.

    Returns:
        The largest absolute difference a column, nats, see ``differences``; of top-k log-probs, over ids that both list.

    Raises:
        DataError: no row is in the cache.
    """
    vocab_size, top_k, dtype = cache.manifest.vocab_size, cache.manifest.top_k, cache.manifest.log_probs_dtype
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
        for name, difference in differences(cache.row(index), numbers, dtype).items():
            largest[name] = max(largest.get(name, 0.0), difference)
    return largest


def differences(
    stored: Mapping[str, np.ndarray], scored: ScoredRow, log_probs_dtype: str = "float32"
) -> dict[str, float]:
    """Largest absolute difference of each column between a stored row and one scored now, beyond the storage's rounding.

    Log-probs below ``LOWEST`` count as it on both sides: probability 0 either way. NaN is infinitely far from everything.

    Args:
        log_probs_dtype: of the cache, see ``Provenance``.

    Returns:
        Nats, zero where rounding explains all; ``topk_ids_missing_share`` of the stored ids that are not listed now.
    """
    out: dict[str, float] = {}
    for name in ("label_log_probs", "entropy", "tail_log_mass"):
        now = getattr(scored, name)
        if name in stored and now is not None and len(now):
            out[name] = largest_gap(stored[name], now, kept_bits(name, log_probs_dtype))
    if scored.topk_ids is not None and scored.topk_log_probs is not None and "topk_ids" in stored:
        ours, theirs, share = shared_places(stored["topk_ids"], scored.topk_ids)
        then, now = stored["topk_log_probs"].reshape(-1)[ours], scored.topk_log_probs.reshape(-1)[theirs]
        out["topk_log_probs"] = largest_gap(then, now, kept_bits("topk_log_probs", log_probs_dtype))
        out["topk_ids_missing_share"] = 1 - share
    return out


def kept_bits(name: str, log_probs_dtype: str) -> int:
    """Mantissa bits that storage keeps of a column."""
    if name == "entropy" or (name == "topk_log_probs" and log_probs_dtype == "float16"):
        return np.finfo(np.float16).nmant
    return KEPT_BITS if log_probs_dtype == "float16" else np.finfo(np.float32).nmant


def largest_gap(stored: np.ndarray, now: np.ndarray, bits: int) -> float:
    """Largest absolute difference but for what rounding to so many mantissa bits may have moved, half a unit; 0 of none."""
    then, now = (values.astype(np.float64).clip(min=LOWEST) for values in (stored, now))
    gap = np.abs(then - now) - np.abs(then) * 2.0 ** -(bits + 1)
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0.0))


def shared_places(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Where two lists ``[tokens, k]`` and ``[tokens, n]`` name the same id of the same token; -1 is an unused slot.

    Returns:
        Flat places in each, and the share of ``ours`` that ``theirs`` names too.
    """
    wide = 1 + int(max(ours.max(initial=0), theirs.max(initial=0)))
    used = [np.flatnonzero(ids.reshape(-1) >= 0) for ids in (ours, theirs)]
    # a token's place and an id in one number, so that one sorted intersection finds all pairs
    keys = [at // ids.shape[1] * wide + ids.reshape(-1)[at] for at, ids in zip(used, (ours, theirs), strict=True)]
    _, here, there = np.intersect1d(*keys, return_indices=True)
    share = float(np.isin(*keys).mean()) if len(used[0]) else 1.0
    return used[0][here], used[1][there], share
