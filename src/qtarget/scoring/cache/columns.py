"""How a frozen model's numbers lie in a shard: few bytes a token, and back again.

Bytes of one significance lie together (Parquet's byte-stream split) before zstd. Beyond that:

- log-probs of labels and tails lose their last mantissa bits, which zstd cannot compress (``KEPT_BITS``), unless
  ``log_probs_dtype`` is float32: then nothing is rounded but the entropy;
- top-k log-probs in half precision are stored as steps: along a descending row the bit patterns of their magnitudes only
  grow, by little, so a step takes one byte and not two. Nothing is lost by it;
- sampled ids ascend and are stored as steps too, each with the number of times that it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qtarget.scoring.cache.rows import Row, Samples, ScoredRow
from qtarget.scoring.cache.schema import Provenance

KEPT_BITS = 16
"""Mantissa bits of stored label log-probs and tail masses: relative error at most 2**-17 (8e-6), a seventh of a byte each."""

LOWEST = float(np.finfo(np.float16).min)
"""Top-k log-probs below it (banned tokens: minus infinity) are stored as it: probability 0 either way, and finite."""

PER_TOKEN = ("label_log_probs", "entropy", "tail_log_mass")
"""Columns with one number a token."""


def round_mantissa(values: np.ndarray, bits: int = KEPT_BITS) -> np.ndarray:
    """float32 values rounded to so many mantissa bits, ties upwards in magnitude.

    Example:
        >>> round_mantissa(np.array([-1.2345678], np.float32), bits=4)
        array([-1.25], dtype=float32)
    """
    # float32 has 23; a carry out of them raises the exponent, and that is the next number
    dropped = 23 - bits
    pattern = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((pattern + np.uint32(1 << (dropped - 1))) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)


def half_steps(log_probs: np.ndarray) -> np.ndarray:
    """float16 log-probs ``[tokens, k]`` (none above 0) as steps between the bit patterns of their magnitudes, uint16."""
    patterns = log_probs.view(np.uint16) & np.uint16(0x7FFF)
    return np.diff(patterns, axis=1, prepend=np.uint16(0))


def from_half_steps(steps: np.ndarray) -> np.ndarray:
    """The inverse of ``half_steps``, bit for bit but for the sign of zero."""
    return (np.cumsum(steps, axis=1, dtype=np.uint16) | np.uint16(0x8000)).view(np.float16)


def stored_columns(scored: Sequence[ScoredRow], plan: Provenance) -> list[str]:
    """Names of the columns that these rows fill; a source that tells no entropy leaves it out."""
    names = [name for name in ("label_log_probs", "entropy") if any(getattr(row, name) is not None for row in scored)]
    if plan.sampled:
        return [*names, "sample_sizes", "sample_ids", "sample_counts"]
    if plan.top_k:
        names += ["topk_ids", "topk_log_probs"]
        if any(row.tail_log_mass is not None for row in scored):
            names.append("tail_log_mass")
    return names


def encode(rows: Sequence[Row], scored: Sequence[ScoredRow], plan: Provenance) -> pa.Table:
    """A shard's table: a row's checksum, and a list of numbers a column."""
    columns: dict[str, pa.Array] = {
        "checksum": pa.array([bytes.fromhex(row.checksum) for row in rows], pa.binary(16)),
    }
    samples = [row.samples for row in scored if row.samples is not None]
    for name in stored_columns(scored, plan):
        if name.startswith("sample_"):
            parts = [getattr(s, name.removeprefix("sample_")) for s in samples]
        else:
            parts = [getattr(row, name) for row in scored]
        flat = np.concatenate([_encoded(name, part, plan).reshape(-1) for part in parts])
        offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.int64)
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    return pa.table(columns)


def _encoded(name: str, values: np.ndarray, plan: Provenance) -> np.ndarray:
    if name in ("label_log_probs", "tail_log_mass"):
        return round_mantissa(values) if plan.log_probs_dtype == "float16" else values.astype(np.float32)
    if name == "entropy":
        return values.astype(np.float16)
    if name == "topk_log_probs":
        clipped = values.clip(LOWEST, 0)
        return half_steps(clipped.astype(np.float16)) if plan.log_probs_dtype == "float16" else clipped
    return values  # ids and counts


def parquet_bytes(table: pa.Table) -> memoryview:
    """One row group, the same bytes for the same numbers."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=max(1, len(table)),
        # pyarrow takes an encoding by column only without dictionaries
        use_dictionary=False,
        write_statistics=False,
        # bytes of one significance together: a third smaller than plain, and read as fast
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in table.column_names[1:]},
    )
    return memoryview(sink.getvalue())


def compact(draws: np.ndarray) -> Samples:
    """Count the distinct ids of each token.

    Args:
        draws: ``[tokens, n]`` int32, n at most 255.

    Example:
        >>> compact(np.array([[7, 3, 7]], np.int32))
        Samples(sizes=array([2], dtype=uint8), ids=array([3, 4], dtype=int32), counts=array([1, 2], dtype=uint8))
    """
    tokens, n = draws.shape
    ordered = np.sort(draws, axis=1).astype(np.int32)
    first = np.ones((tokens, n), bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    sizes = first.sum(1)
    starts = np.flatnonzero(first)
    counts = np.diff(np.append(starts, tokens * n))
    ids = ordered[first]
    steps = np.diff(ids, prepend=np.int32(0))
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])[sizes > 0]
    steps[begins] = ids[begins]  # each token starts anew
    return Samples(sizes.astype(np.uint8), steps.astype(np.int32), counts.astype(np.uint8))


def expand(sizes: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """What was drawn, as a ``Reference`` lists it: ids ``-1`` and log-probs of minus infinity in unused slots.

    Returns:
        ``topk_ids [tokens, most]`` int32 and ``topk_log_probs [tokens, most]`` float32, log of count / draws.
    """
    sizes = sizes.astype(np.int64)
    most = int(sizes.max(initial=1))
    used = np.arange(most) < sizes[:, None]
    steps, times = np.zeros(used.shape, np.int32), np.zeros(used.shape, np.float32)
    steps[used], times[used] = ids, counts
    # unused slots were drawn 0 times: their log is minus infinity, as it should be
    with np.errstate(divide="ignore", invalid="ignore"):
        log_probs = np.log(times / times.sum(1, keepdims=True))
    return {"topk_ids": np.where(used, np.cumsum(steps, axis=1), -1).astype(np.int32), "topk_log_probs": log_probs}


def flat_lists(table: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets ``[rows + 1]`` and values of a column of lists."""
    chunks = table[name].chunks
    lists: Any = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)  # one chunk stays where it is: on the file
    return lists.offsets.to_numpy(), lists.flatten().to_numpy(zero_copy_only=True)
