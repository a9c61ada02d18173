"""A cache in the columns of other projects; see ``qtarget.scoring.exchange.foreign`` for how they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from qtarget.core.errors import ConfigError, DataError, IncompatibleError
from qtarget.scoring.cache.columns import LOWEST
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import Row, read_row
from qtarget.scoring.exchange.bits import pack_bits
from qtarget.storage.files import write_atomic, writing
from qtarget.storage.folders import EXPORT, owned

BATCH = 256
"""Rows of a Parquet row group."""

Numbers = Mapping[str, np.ndarray]


def export_rows(cache: ReferenceCache, rows: Sequence[Mapping[str, Any]], name: str, directory: str | Path) -> int:
    """Write ``data_0.parquet`` for DistillKit, axolotl or verl.

    Args:
        rows: ``input_ids`` and ``labels`` of the cached rows: a cache knows checksums only.
        name: ``distillkit``, ``axolotl`` or ``verl``.

    Returns:
        The number of rows written.

    Raises:
        IncompatibleError: the cache has no top-k log-probs.
        CacheMismatchError: a row was never scored.
        ConfigError: no such format, the file exists, or the folder is somebody else's.
        DataError: DistillKit has no masks, and a row has tokens that were not scored.
    """
    directory = Path(directory)
    writers: dict[str, Callable[[Row, Numbers], dict[str, Any]]] = {
        "axolotl": axolotl_row,
        "verl": verl_row,
        "distillkit": lambda row, numbers: distillkit_row(row, numbers, cache.manifest.vocab_size),
    }
    if name not in writers:
        raise ConfigError(f"format {name!r} is unknown; expected one of {', '.join(writers)}")
    if not cache.manifest.top_k:
        raise IncompatibleError(f"{cache.path} holds no top-k log-probs, and {name} has columns for nothing else")
    path = directory / "data_0.parquet"
    if path.exists():
        raise ConfigError(f"{path} exists already; choose a new folder")
    with owned(directory, EXPORT, inputs=[cache.path]):
        return write_rows(cache, rows, name, path, writers[name])


def write_rows(
    cache: ReferenceCache,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    path: Path,
    convert: Callable[[Row, Numbers], dict[str, Any]],
) -> int:
    """Write the rows of ``export_rows``, the file whole or not at all; how many."""
    read = [read_row(row, index, cache.manifest.vocab_size) for index, row in enumerate(rows)]
    found = cache.locate([row.checksum for row in read])
    if name == "distillkit":
        write_atomic(path.with_name("compression_config.yaml"), distillkit_config(cache).encode())
    with writing(path) as file, pq.ParquetWriter(file, SCHEMAS[name]) as writer:
        for start in range(0, len(read), BATCH):
            batch = [
                convert(row, filled(cache.row(i)))
                for row, i in zip(read[start:][:BATCH], found[start:][:BATCH], strict=True)
            ]
            writer.write_table(pa.Table.from_pylist(batch, schema=SCHEMAS[name]))
    return len(read)


def filled(numbers: Numbers) -> Numbers:
    """The same with real ids in unused slots too, lowest first, of tokens that are not listed there: no format has an id -1.

    Their log-prob is ``LOWEST``, probability 0, as in the cache; ``import`` reads such slots as unused.
    """
    ids = numbers["topk_ids"].copy()
    for t in np.flatnonzero((ids < 0).any(1)):
        unused = ids[t] < 0
        ids[t, unused] = np.setdiff1d(np.arange(ids.shape[1]), ids[t])[: unused.sum()]
    return {**numbers, "topk_ids": ids}


def spread(row: Row, values: np.ndarray, shift: int, fill: float, length: int) -> np.ndarray:
    """Numbers ``[positions, k]`` at ``t - shift`` of ``[length, k]``, ``fill`` elsewhere."""
    out = np.full((length, values.shape[1]), fill, values.dtype)
    out[row.positions - shift] = values
    return out


def axolotl_row(row: Row, numbers: Numbers) -> dict[str, Any]:
    """Label rows; its loss expects probabilities scaled up to one."""
    length = len(row.input_ids)
    labels = np.full(length, -100)
    labels[row.positions] = row.input_ids[row.positions]
    log_probs = numbers["topk_log_probs"].astype(np.float32)
    log_probs = log_probs - np.log(np.exp(log_probs).sum(1, keepdims=True))
    mask = np.zeros((length, log_probs.shape[1]), np.int8)
    mask[row.positions] = numbers["topk_log_probs"] > LOWEST
    return {
        "input_ids": row.input_ids,
        "attention_mask": np.ones(length, np.int8),
        "labels": labels,
        "target_token_ids": list(spread(row, numbers["topk_ids"], 0, 0, length)),
        "target_logprobs": list(spread(row, log_probs, 0, -np.inf, length)),
        "target_mask": list(mask),
    }


def verl_row(row: Row, numbers: Numbers) -> dict[str, Any]:
    """Prediction rows; zeros where nothing is known, as its padding has them."""
    length = len(row.input_ids)
    response = np.zeros(length, np.int8)
    response[row.positions] = 1
    return {
        "input_ids": row.input_ids,
        "attention_mask": np.ones(length, np.int8),
        "response_mask": response,
        "teacher_ids": list(spread(row, numbers["topk_ids"], 1, 0, length)),
        "teacher_logprobs": list(spread(row, numbers["topk_log_probs"].astype(np.float32), 1, 0.0, length)),
    }


def distillkit_row(row: Row, numbers: Numbers, vocab_size: int) -> dict[str, Any]:
    """Prediction rows, one fewer than tokens; exact values, packed ids."""
    if len(row.positions) != len(row.input_ids) - 1:
        raise DataError(
            f"row {row.checksum} has {len(row.input_ids) - 1} predicted tokens, {len(row.positions)} of them scored; "
            "DistillKit trains on every token: score with labels equal to input_ids, or export to axolotl or verl"
        )
    values = np.ascontiguousarray(numbers["topk_log_probs"].astype("<f4"))
    return {
        "input_ids": row.input_ids,
        "compressed_logprobs": list(values.view(np.uint8).reshape(len(values), -1)),
        "bytepacked_indices": list(pack_bits(numbers["topk_ids"], index_bits(vocab_size))),
    }


def index_bits(vocab_size: int) -> int:
    """Bits of an id, as DistillKit counts them."""
    return int(np.ceil(np.log2(np.float32(vocab_size))))


def distillkit_config(cache: ReferenceCache) -> str:
    """``compression_config.yaml``: every value exact."""
    k = cache.manifest.top_k
    settings = {"d": cache.manifest.vocab_size, "k": k, "exact_k": k, "exact_dtype": "float32"}
    return yaml.safe_dump({**settings, "polynomial_terms": None, "residual_bins": [], "delta_encoding": False})


def _nested(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.list_(item))


SCHEMAS = {
    "axolotl": pa.schema(
        {
            "input_ids": pa.list_(pa.int64()),
            "attention_mask": pa.list_(pa.int8()),
            "labels": pa.list_(pa.int64()),
            "target_token_ids": _nested(pa.int64()),
            "target_logprobs": _nested(pa.float32()),
            "target_mask": _nested(pa.int8()),
        }
    ),
    "verl": pa.schema(
        {
            "input_ids": pa.list_(pa.int64()),
            "attention_mask": pa.list_(pa.int8()),
            "response_mask": pa.list_(pa.int8()),
            "teacher_ids": _nested(pa.int64()),
            "teacher_logprobs": _nested(pa.float32()),
        }
    ),
    "distillkit": pa.schema(
        {
            "input_ids": pa.list_(pa.uint64()),
            "compressed_logprobs": _nested(pa.uint8()),
            "bytepacked_indices": _nested(pa.uint8()),
        }
    ),
}
"""Column types of each project's files."""
