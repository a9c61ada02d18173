"""What packed files take when they are unpacked, counted before anything of it is kept."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qtarget.data.limits import Limits

BLOCK = 2**20
BATCH = 256
"""Rows that are decoded at once: a dictionary makes any number of large values out of one."""
FRAMES = (0xFD2FB528, 0x184D2204)
"""How a buffer of Arrow begins that is packed by zstd or LZ4, as a little-endian word; its size stands before it."""


def open_text(path: Path) -> Any:
    """A file of text, unpacked by what its name ends in."""
    name = path.name.lower()
    if path.stat().st_size == 0:
        return path.open("rb")
    if name.endswith(".gz"):
        return gzip.open(path)
    if name.endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


def check_text(path: Path, limits: Limits) -> None:
    """Refuse a file of text that is too large; a packed one is unpacked once for that, and nothing is kept.

    Raises:
        DataError: names the limit.
    """
    size = path.stat().st_size
    limits.check_bytes(path, size, size)
    if not path.name.lower().endswith((".gz", ".zst")):
        return
    unpacked = rows = 0
    by_line = path.name.lower().rpartition(".")[0].endswith((".jsonl", ".ndjson"))
    with open_text(path) as stream:
        while block := stream.read(BLOCK):
            unpacked += len(block)
            limits.check_bytes(path, unpacked, size)
            if by_line:
                rows += block.count(b"\n")
                limits.check_rows(path, rows)


def read_table(path: Path, limits: Limits) -> Any:
    """A Parquet or Arrow file as an Arrow table.

    Raises:
        DataError: it is too large; names the limit.
    """
    size = path.stat().st_size
    limits.check_bytes(path, size, size)
    parts, schema = _parquet(path, limits) if path.suffix.lower() == ".parquet" else _arrow(path, limits)
    import pyarrow as pa

    kept, unpacked, rows = [], 0, 0
    for batch in parts:
        rows += batch.num_rows
        limits.check_rows(path, rows)
        unpacked += sum(map(decoded_bytes, batch.columns))
        limits.check_bytes(path, unpacked, size)
        kept.append(batch)
    return pa.Table.from_batches(kept, schema=schema)


def decoded_bytes(array: Any) -> int:
    """What an Arrow array takes where every row holds its own values: dictionaries, runs and views share them.

    Example:
        >>> import pyarrow as pa
        >>> decoded_bytes(pa.array(["a" * 100] * 50).dictionary_encode())
        5000
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time
    kind, is_ = array.type, pa.types
    if is_.is_dictionary(kind):
        return int(_bytes_each(array.dictionary)[array.indices.drop_null().to_numpy(zero_copy_only=False)].sum())
    if is_.is_run_end_encoded(kind):
        runs = np.diff(array.run_ends.to_numpy(zero_copy_only=False), prepend=0)
        return int((_bytes_each(array.values) * runs).sum())
    if is_.is_struct(kind):
        return sum(map(decoded_bytes, array.flatten()))
    if is_.is_map(kind):
        return array.nbytes + decoded_bytes(array.items)
    if is_.is_nested(kind):  # lists of all sorts, also those that share their values
        return array.nbytes + decoded_bytes(pc.list_flatten(array))
    return int(_bytes_each(array).sum())


def _bytes_each(array: Any) -> Any:
    """Bytes of each value, as float64: sums of hostile numbers must not overflow."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    kind, is_ = array.type, pa.types
    if is_.is_string_view(kind) or is_.is_binary_view(kind):  # 16 bytes a value, its length first
        return np.frombuffer(array.buffers()[1], "<i4")[4 * array.offset :][: 4 * len(array) : 4].astype(float)
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_binary(kind) or is_.is_large_binary(kind):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(float)
    if is_.is_nested(kind) or is_.is_dictionary(kind):
        return np.array([decoded_bytes(array[i : i + 1]) for i in range(len(array))], float)
    return np.full(len(array), array.nbytes / max(1, len(array)))


def _parquet(path: Path, limits: Limits) -> tuple[Iterator[Any], Any]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    about = file.metadata
    limits.check_rows(path, about.num_rows)
    limits.check_bytes(path, sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)), _size(path))
    return file.iter_batches(BATCH, use_threads=False), file.schema_arrow


def _arrow(path: Path, limits: Limits) -> tuple[Iterator[Any], Any]:
    import pyarrow as pa

    _check_buffers(path, limits)
    source = pa.memory_map(str(path))
    try:
        file = pa.ipc.open_file(source)
        return _valid(file.get_batch(i) for i in range(file.num_record_batches)), file.schema
    except pa.ArrowInvalid:  # datasets writes streams
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        return _valid(stream), stream.schema


def _valid(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches whose offsets stay inside their buffers: Arrow believes them, and would read what lies behind."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _check_buffers(path: Path, limits: Limits) -> None:
    """Add up what the packed buffers of an Arrow file say they hold; Arrow takes that memory before it unpacks any."""
    import numpy as np

    if _size(path) < 8:
        return
    words = np.memmap(path, "<u4", "r", shape=(_size(path) // 4,))
    unpacked = 0
    for start in range(0, len(words), BLOCK):
        for frame in FRAMES:
            for at in start + np.flatnonzero(words[start : start + BLOCK] == frame):
                # buffers begin at eight bytes; a negative size says that what follows is not packed
                if at % 2 == 0 and at >= 2 and words[at - 1] < 2**31:
                    unpacked += int(words[at - 2]) | int(words[at - 1]) << 32
    limits.check_bytes(path, unpacked, _size(path))


def _size(path: Path) -> int:
    return path.stat().st_size
