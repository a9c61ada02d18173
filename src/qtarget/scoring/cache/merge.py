"""Several caches of one model, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qtarget.core.errors import CacheMismatchError, ConfigError
from qtarget.scoring.cache.columns import parquet_bytes
from qtarget.scoring.cache.plan import PlannedShard
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import Manifest, Provenance, ShardRecord
from qtarget.scoring.cache.writer import place_shard, shared_fields
from qtarget.storage.files import TEMPORARY
from qtarget.storage.folders import CACHE, mark_folder, refuse_overlap
from qtarget.storage.locks import LOCK, locked

MAY_DIFFER = ("model_id", "versions", "engine_version")
"""A name and tool versions are for people; everything else decides the numbers."""


def merge_caches(paths: Sequence[str | Path], directory: str | Path) -> Manifest:
    """Write one cache that holds the rows of several, in their order; a repeated row is taken from the first.

    Whole shards are copied byte for byte. The folder appears when it is finished.

    Raises:
        CacheMismatchError: a cache is damaged, or differs from the first (names field, found and expected).
        ConfigError: fewer than two caches, ``directory`` exists already, or another process is merging into it.
    """
    directory = Path(directory)
    if len(paths) < 2:
        raise ConfigError(f"{len(paths)} cache to merge; expected at least two folders")
    refuse_overlap(directory, paths)
    if directory.exists():
        raise ConfigError(f"{directory} exists already; choose a new folder for the merged cache")
    caches = [ReferenceCache.open(path) for path in paths]
    for other in caches[1:]:
        require_like(caches[0], other)
    building = directory.with_name(directory.name + TEMPORARY)
    building.mkdir(parents=True, exist_ok=True)
    with locked(building):
        if directory.exists():  # another merge was faster: what we hold the lock of is its folder
            raise ConfigError(f"{directory} exists already; choose a new folder for the merged cache")
        manifest = copy_all(caches, building)
        mark_folder(building, CACHE)
        building.rename(directory)
        (directory / LOCK).unlink()  # it moved along
    return manifest


def copy_all(caches: Sequence[ReferenceCache], building: Path) -> Manifest:
    """Write the rows of all caches, each once, and their manifest into a folder; what a killed merge left there goes."""
    for leftover in building.iterdir():
        if leftover.name != LOCK:
            leftover.unlink()
    seen: set[bytes] = set()
    shards: list[ShardRecord] = []
    for cache in caches:
        for record in cache.manifest.shards:
            if (shard := copy_shard(cache, record, building, len(shards), seen)) is not None:
                shards.append(shard)
    first = caches[0].manifest
    manifest = Manifest(
        **shared_fields(first),
        rows=len(seen),
        tokens=sum(shard.tokens for shard in shards),
        columns=first.columns,
        shards=tuple(shards),
        schema_version=first.schema_version,
    )
    manifest.write(building)
    return manifest


def require_like(first: ReferenceCache, other: ReferenceCache) -> None:
    """Make sure that two caches say the same kind of thing about the same model.

    Raises:
        CacheMismatchError: names each field that differs.
    """
    names = [field.name for field in fields(Provenance) if field.name not in MAY_DIFFER]
    differing = [
        f"{name} is {getattr(other.manifest, name)!r}, expected {getattr(first.manifest, name)!r}"
        for name in [*names, "columns", "schema_version"]
        if getattr(other.manifest, name) != getattr(first.manifest, name)
    ]
    if differing:
        raise CacheMismatchError(
            f"{other.path} cannot be merged with {first.path}: {'; '.join(differing)}; score its rows again with the "
            "settings of the first"
        )


def copy_shard(
    cache: ReferenceCache, record: ShardRecord, target: Path, number: int, seen: set[bytes]
) -> ShardRecord | None:
    """Put the rows of a shard that were not seen before into the next shard of ``target``; none if all were."""
    path, manifest = cache.path / record.name, cache.manifest
    checksums = pq.read_table(path, columns=["checksum"])["checksum"].to_pylist()
    new = np.array([checksum not in seen for checksum in checksums])
    seen.update(checksums)
    if not new.any():
        return None
    name, tokens, content = f"shard-{number:05d}.parquet", record.tokens, memoryview(path.read_bytes())
    if not new.all():
        table = pq.read_table(path, use_threads=False).filter(pa.array(new)).combine_chunks()
        tokens, content = count_tokens(table), parquet_bytes(table)
    # no digest of rows: only a run that resumes compares it, and a merge starts anew
    planned = PlannedShard(name, int(new.sum()), tokens, "")
    return place_shard(target, planned, content, manifest, manifest.schema_version)


def count_tokens(table: pa.Table) -> int:
    """Tokens of a shard's table: the length of a column with one number each."""
    one_each = next(
        n for n in ("label_log_probs", "entropy", "tail_log_mass", "sample_sizes") if n in table.column_names
    )
    return int(pc.sum(pc.list_value_length(table[one_each])).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
