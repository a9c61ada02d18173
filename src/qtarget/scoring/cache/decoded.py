"""Shards, decoded once into files that training maps into memory: the page cache is all the memory that reading takes.

A side file is an Arrow IPC file in ``.decoded`` beside the shards, named by its shard's hash. The shard's record in the
manifest has the digest of its numbers, which is compared when a cache is opened; a side file of another owner is never taken.
Workers share it through the page cache; the system drops its pages when memory is short. It takes 6 bytes a token, with top-k
4 + 6k more, and may be deleted at any time: it is made again when it is asked for.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qtarget.core.errors import CacheMismatchError, StorageError
from qtarget.scoring.cache.columns import PER_TOKEN, flat_lists, from_half_steps
from qtarget.scoring.cache.schema import DECODED, Manifest, Provenance, ShardRecord
from qtarget.storage.files import digest, digest_file, write_atomic, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedShard:
    """The columns of a shard as flat, read-only arrays on the file.

    Attributes:
        offsets: ``[rows + 1]``; tokens of row i are ``offsets[i] : offsets[i + 1]``.
        columns: ``[tokens]`` or ``[tokens, k]`` each; of draws, ``[distinct]``.
        drawn: ``[rows + 1]`` offsets of the draws, or absent.
    """

    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    drawn: np.ndarray | None = None


def load_shard(directory: Path, shard: ShardRecord, manifest: Manifest) -> LoadedShard:
    """Map a shard's side file, making it first if there is none or it is cut short."""
    path = side_file(directory, shard)
    # under the lock, or another process may delete it between the look and the mapping
    with building(path.parent):
        if not looks_whole(path):
            make_side_file(directory, shard, manifest, path)
        source = pa.memory_map(str(path))  # from here on it may be deleted
    with source:
        table = pa.ipc.open_file(source).read_all()
    columns: dict[str, np.ndarray] = {}
    offsets, drawn = np.zeros(1, np.int64), None
    for name in table.column_names:
        ends, flat = flat_lists(table, name)
        if name.startswith("topk"):
            check_width(len(flat), table, manifest)
            flat, ends = flat.reshape(-1, manifest.top_k), ends // manifest.top_k
        columns[name] = flat
        if name == "sample_ids":
            drawn = ends
        elif name in (*PER_TOKEN, "topk_ids", "sample_sizes"):
            offsets = ends
    return LoadedShard(offsets, columns, drawn)


def side_file(directory: Path, shard: ShardRecord) -> Path:
    """Where a shard's side file is, or will be: beside the cache, or in the temporary folder if that is not ours to write.

    Raises:
        StorageError: see ``private_folder``.
    """
    folder = directory / DECODED
    ours = is_ours(folder, stat.S_ISDIR) if os.path.lexists(folder) else True
    if not ours or not os.access(folder if folder.exists() else directory, os.W_OK):
        folder = private_folder(Path(tempfile.gettempdir()) / f"qtarget-decoded-{os.getuid()}")
    return folder / f"{shard.blake2b}.arrow"


def is_ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether this user made what is there, and it is of this kind and no link."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid()


def private_folder(path: Path) -> Path:
    """A folder below a shared one, made if absent, into which nobody else can have put a file.

    Raises:
        StorageError: what is there is a link or no folder, belongs to somebody else, or others may write into it.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()  # of a link, the link's own
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is no folder"
    elif found.st_uid != os.getuid():
        wrong = f"belongs to user {found.st_uid}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = f"may be written to by others (mode {stat.S_IMODE(found.st_mode):o})"
    else:
        return path
    raise StorageError(
        f"{path} {wrong}; expected a folder of user {os.getuid()} that nobody else can write to, for decoded numbers are "
        "read from there unchecked; remove it, or set TMPDIR to a folder of your own"
    )


def make_side_file(directory: Path, shard: ShardRecord, manifest: Manifest, path: Path) -> None:
    """Decode one shard; one at a time is in memory."""
    if path.parent.parent != directory:
        logger.warning("%s is read-only or another user's; its decoded numbers go to %s", directory, path.parent)
    else:
        drop_stale(path.parent, manifest)
    stored = pq.read_table(directory / shard.name, use_threads=False)
    require_columns(directory / shard.name, stored.column_names, manifest)
    table = decoded_table(stored, manifest, manifest.schema_version)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = memoryview(sink.getvalue())
    # receipt first, file last: a kill between them leaves nothing that looks whole
    write_json(path.with_suffix(".json"), {"bytes": len(content), "blake2b": digest(content)})
    write_atomic(path, content)


def require_columns(path: Path, names: Sequence[str], manifest: Manifest) -> None:
    """Make sure that a shard has the columns of the manifest, after its checksums.

    Raises:
        CacheMismatchError: it has others.
    """
    if differing := sorted({"checksum", *manifest.columns} ^ set(names)):
        raise CacheMismatchError(
            f"{path} and the manifest differ in the columns {', '.join(differing)}; score again into another folder"
        )


def drop_stale(folder: Path, manifest: Manifest) -> None:
    """Delete side files of shards that the cache no longer has; whoever mapped them keeps them."""
    known = {shard.blake2b for shard in manifest.shards}
    for path in folder.glob("*.arrow"):
        if path.stem not in known:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def decoded_table(table: pa.Table, manifest: Provenance, schema_version: int) -> pa.Table:
    """The lists of a shard with everything undone that only storage needs."""
    columns = {name: table[name].combine_chunks() for name in table.column_names[1:]}
    if schema_version > 1 and manifest.log_probs_dtype == "float16" and "topk_log_probs" in columns:
        offsets, steps = flat_lists(table, "topk_log_probs")
        check_width(len(steps), table, manifest)
        flat = from_half_steps(steps.astype(np.uint16).reshape(-1, manifest.top_k)).reshape(-1)
        columns["topk_log_probs"] = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
    return pa.table(columns)


def check_width(entries: int, table: pa.Table, manifest: Provenance | Manifest) -> None:
    """Refuse listed ids of another number a token than the manifest says.

    Raises:
        CacheMismatchError: says both numbers.
    """
    counted = next((name for name in PER_TOKEN if name in table.column_names), None)
    tokens = entries // manifest.top_k if counted is None else len(flat_lists(table, counted)[1])
    if entries != tokens * manifest.top_k:
        raise CacheMismatchError(
            f"a shard lists {entries / max(1, tokens):g} ids a token, the manifest says top_k {manifest.top_k}; one was edited: "
            "take the cache from where it was made, or score again into another folder"
        )


def decoded_digest(table: pa.Table) -> str:
    """BLAKE2b over names, types, offsets and values of the columns, whatever file they are in."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(table.column_names):
        offsets, flat = flat_lists(table, name)
        state.update(f"{name}:{flat.dtype.str}:{len(offsets)}:{len(flat)};".encode())
        state.update(np.ascontiguousarray(offsets, "<i8").view(np.uint8).data)
        state.update(np.ascontiguousarray(flat).view(np.uint8).data)
    return state.hexdigest()


def looks_whole(path: Path, *, shard: ShardRecord | None = None) -> bool:
    """Whether a side file is ours and has the size that its receipt says; of a given shard, the content too."""
    try:
        if not (is_ours(path, stat.S_ISREG) and is_ours(path.with_suffix(".json"), stat.S_ISREG)):
            return False
        receipt = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if path.stat().st_size != receipt["bytes"]:
            return False
        return shard is None or (digest_file(path) == receipt["blake2b"] and shard.decoded in ("", digest_of(path)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def digest_of(path: Path) -> str:
    """``decoded_digest`` of a side file.

    Raises:
        ValueError, OSError: it is no such file, or its offsets lead out of it.
    """
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        return decoded_digest(table)


def check_side_file(directory: Path, shard: ShardRecord, manifest: Manifest) -> None:
    """Decode a shard once more, and compare the record and the side file, if there is one, with it.

    Raises:
        CacheMismatchError: the record says something else.
    """
    stored = pq.read_table(directory / shard.name, use_threads=False)
    found = decoded_digest(decoded_table(stored, manifest, manifest.schema_version))
    if shard.decoded not in ("", found):
        raise CacheMismatchError(
            f"{directory / shard.name} decodes to numbers of the hash {found}, the manifest says {shard.decoded}; it was "
            "edited, or written by another release; score again into another folder"
        )
    drop_damaged(directory, replace(shard, decoded=found))


def drop_damaged(directory: Path, shard: ShardRecord) -> None:
    """Delete a side file whose content is not what was written; it is made again when it is asked for."""
    path = side_file(directory, shard)
    if os.path.lexists(path) and not looks_whole(path, shard=shard):
        with building(path.parent):  # where nobody writes it, look again
            if not looks_whole(path, shard=shard):
                logger.warning("%s is damaged or not of this shard; decoding %s again", path, shard.name)
                path.unlink(missing_ok=True)


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """One process makes or deletes side files at a time; the others wait and find what it left."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
