"""Shards on disk: a run that is killed goes on where it stopped, and ends with the bytes of an undisturbed one.

A shard is finished when its Parquet file matches its receipt (``shard-00000.json``: counts, size, hash). The receipt is
written first, the Parquet file renamed last, so no order of events makes half a shard look whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qtarget.core.errors import (
    CacheMismatchError,
    DataError,
    HyperparameterError,
    IncompatibleError,
    NonFiniteLossError,
)
from qtarget.scoring.cache.columns import encode, parquet_bytes
from qtarget.scoring.cache.decoded import decoded_digest, decoded_table
from qtarget.scoring.cache.plan import KeptRow, Plan, PlannedShard, adopt_plan, distinct_rows, plan_shards
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.rows import Row, SamplingSource, ScoredRow, Source, check_request, read_row
from qtarget.scoring.cache.schema import MOST_DRAWS, SCHEMA_VERSION, Manifest, Provenance, ShardRecord
from qtarget.storage.files import TEMPORARY, digest, digest_file, write_atomic, write_json
from qtarget.storage.folders import CACHE, owned

logger = logging.getLogger(__name__)


def write_cache(
    directory: str | Path,
    rows: Sequence[Mapping[str, Any]],
    source: Source,
    provenance: Provenance,
    *,
    shard_rows: int = 2000,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    meter: TokenMeter | None = None,
    known: Container[str] = (),
) -> Manifest:
    """Score all rows that no finished shard holds, and write the manifest last.

    Args:
        directory: the cache's folder; made if absent.
        rows: each with ``input_ids`` and ``labels`` (see ``read_row``); repeated rows are stored once.
        source: what scores them.
        provenance: what the manifest will say of the source.
        shard_rows: rows a shard, and the most work a kill can lose.
        logit_scale, logit_softcap: what the source was given; a run may only go on with the same.
        meter: is told of progress, in supervised tokens.
        known: checksums of rows that another cache holds; they are left out.

    Returns:
        The manifest of the finished cache.

    Raises:
        ConfigError: another process is writing the folder, or it is somebody else's.
        CacheMismatchError: the folder was begun with another plan, or a source changed which columns it tells.
        DataError: a row is unusable.
        HyperparameterError: ``top_k`` exceeds the vocabulary, or ``sampled`` a byte.
        IncompatibleError: draws from a source that cannot make them, or together with top-k.
        NonFiniteLossError: the source returned NaN or infinite numbers.
    """
    check_request([], provenance.top_k, None, None, provenance.vocab_size)
    check_sampling(source, provenance)
    directory, meter = Path(directory), meter or TokenMeter(enabled=False)
    with owned(directory, CACHE):
        kept = [row for row in distinct_rows(rows, provenance.vocab_size) if row.checksum not in known]
        if not kept:
            raise DataError(
                f"every one of the {len(rows)} rows is in the known cache already; there is nothing to score"
            )
        plan = Plan(
            **shared_fields(provenance),
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            shard_rows=shard_rows,
            shards=plan_shards(kept, shard_rows),
        )
        adopt_plan(directory, plan)
        # under the lock, so nobody is writing them
        for leftover in directory.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        meter.start(plan.tokens)
        shards = write_missing(directory, rows, kept, source, plan, meter)
        columns = common_columns(directory, shards)
        manifest = Manifest(
            **shared_fields(provenance), rows=len(kept), tokens=plan.tokens, columns=columns, shards=shards
        )
        manifest.write(directory)
    return manifest


def write_missing(
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    kept: Sequence[KeptRow],
    source: Source,
    plan: Plan,
    meter: TokenMeter,
) -> tuple[ShardRecord, ...]:
    """Score and place every planned shard that is not finished; the records of all, in order."""
    records: dict[int, ShardRecord] = {}
    # all finished shards before any scoring, so that the bar's total is right from the start
    for number, shard in enumerate(plan.shards):
        if (record := finished_shard(directory, shard)) is not None:
            records[number] = record
            meter.skip(shard.tokens)
    size = plan.shard_rows
    missing = [number for number in range(len(plan.shards)) if number not in records]
    # lazily: rows are in memory while their shard is scored
    work = ((n, read_again(rows, kept[n * size : (n + 1) * size], plan.vocab_size)) for n in missing)
    for number, content in scored_shards(source, work, plan):
        records[number] = place_shard(directory, plan.shards[number], content, plan)
        # other sources count row by row as they score
        if isinstance(source, ShardMapper):
            meter.advance(plan.shards[number].tokens)
    return tuple(records[number] for number in range(len(plan.shards)))


def check_sampling(source: Any, provenance: Provenance) -> None:
    """Refuse draws that the source cannot make, before any work.

    Raises:
        IncompatibleError: the source sees no whole distribution, or samples and top-k are both asked for.
        HyperparameterError: more draws than a byte can count.
    """
    draws = provenance.sampled
    if not 0 <= draws <= MOST_DRAWS:
        raise HyperparameterError(
            f"sampled={draws}; expected 0 (none) to {MOST_DRAWS} draws a token; 50 is the paper's"
        )
    if draws and provenance.top_k:
        raise IncompatibleError(
            f"sampled={draws} and top_k={provenance.top_k}; a cache holds one of them: set one to 0"
        )
    if draws and not isinstance(source, SamplingSource | ShardMapper):
        raise IncompatibleError(
            f"{type(source).__name__} tells its largest log-probs only, and sampling needs the whole distribution; "
            "score with a model in this process, or take --top_k instead of --sampled"
        )


def common_columns(directory: Path, shards: Sequence[ShardRecord]) -> tuple[str, ...]:
    """The columns that every shard has.

    Raises:
        CacheMismatchError: shards differ: a server changed what it tells while it was asked.
    """
    found = {shard.name: tuple(pq.read_schema(directory / shard.name).names[1:]) for shard in shards}
    first = next(iter(found.values()))
    for name, columns in found.items():
        if columns != first:
            raise CacheMismatchError(
                f"{directory / name} holds {', '.join(columns)}, the shards before it {', '.join(first)}; expected one "
                "set; delete this shard and run `qtarget score CONFIG.yaml` again"
            )
    return first


def shared_fields(provenance: Provenance) -> dict[str, Any]:
    return {field.name: getattr(provenance, field.name) for field in fields(Provenance)}


def read_again(rows: Sequence[Mapping[str, Any]], part: Sequence[KeptRow], vocab_size: int) -> list[Row]:
    """The planned rows themselves."""
    return [read_row(rows[kept.index], kept.index, vocab_size) for kept in part]


def finished_shard(directory: Path, shard: PlannedShard) -> ShardRecord | None:
    """The receipt of a shard whose file is whole, else nothing; damage is logged, for the shard is scored again."""
    path = directory / shard.name
    receipt = path.with_suffix(".json")
    if not (path.exists() and receipt.exists()):
        return None
    try:
        record = ShardRecord(**json.loads(receipt.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning("%s is unreadable (%s); scoring its shard again", receipt, error)
        return None
    whole = path.stat().st_size == record.bytes and digest_file(path) == record.blake2b
    if whole and (record.name, record.rows, record.tokens) == (shard.name, shard.rows, shard.tokens):
        return record
    logger.warning("%s does not match its receipt (%s bytes, %s); scoring it again", path, record.bytes, record.blake2b)
    return None


@runtime_checkable
class ShardMapper(Protocol):
    """A source that scores many shards at once, elsewhere; names, resume and counts stay with ``write_cache``."""

    def map_shards(
        self, work: Iterator[tuple[int, list[Row]]], plan: Provenance
    ) -> Iterator[tuple[int, bytes | memoryview]]:
        """``shard_content`` of each numbered shard, each once, in any order."""
        ...


def scored_shards(
    source: Source, work: Iterator[tuple[int, list[Row]]], plan: Provenance
) -> Iterator[tuple[int, bytes | memoryview]]:
    """The content of each numbered shard, in the order in which they are done."""
    if isinstance(source, ShardMapper):
        yield from source.map_shards(work, plan)
    else:
        for number, rows in work:
            yield number, shard_content(rows, source, plan)


def shard_content(rows: Sequence[Row], source: Source, plan: Provenance) -> memoryview:
    """Score the rows of one shard: the bytes of its Parquet file.

    Raises:
        NonFiniteLossError: a number is NaN or infinite.
    """
    ids, places = [row.input_ids for row in rows], [row.positions for row in rows]
    if plan.sampled:
        draws = [uniforms(row.checksum, plan.seed, len(row.positions), plan.sampled) for row in rows]
        assert isinstance(source, SamplingSource)
        scored = source.sample(ids, draws, positions=places)
    else:
        scored = source.score(ids, plan.top_k, positions=places)
    check_finite(rows, scored)
    return parquet_bytes(encode(rows, scored, plan))


def uniforms(checksum: str, seed: int, tokens: int, draws: int) -> np.ndarray:
    """Numbers in [0, 1) ``[tokens, draws]`` that follow from a row and a seed alone, whatever is scored beside it."""
    key = hashlib.blake2b(f"{seed}:{checksum}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random((tokens, draws))


def place_shard(
    directory: Path,
    shard: PlannedShard,
    content: bytes | memoryview,
    plan: Provenance,
    schema_version: int = SCHEMA_VERSION,
) -> ShardRecord:
    """Write a shard's receipt, then the shard itself."""
    decoded = decoded_digest(decoded_table(pq.read_table(pa.BufferReader(content)), plan, schema_version))
    record = ShardRecord(shard.name, shard.rows, shard.tokens, len(content), digest(content), decoded)
    path = directory / shard.name
    write_json(path.with_suffix(".json"), asdict(record))
    write_atomic(path, content)
    return record


def check_finite(rows: Sequence[Row], scored: Sequence[ScoredRow]) -> None:
    """Refuse what is no log-prob or entropy before it is stored; a banned or empty top-k or tail may be minus infinity.

    Raises:
        NonFiniteLossError: names the row's checksum and the first position.
    """
    for row, numbers in zip(rows, scored, strict=True):
        good = np.ones(len(row.positions), bool)
        for values in (numbers.label_log_probs, numbers.entropy):
            if values is not None:  # imported rows may know no label log-prob
                good &= np.isfinite(values)
        for values in (numbers.topk_log_probs, numbers.tail_log_mass):
            if values is not None:
                good &= (
                    (values < np.inf).reshape(len(good), values.size // max(1, len(good))).all(1)
                )  # NaN is not below it
        if not good.all():
            t = int(row.positions[np.flatnonzero(~good)[0]])
            raise NonFiniteLossError(
                f"the frozen model gives a log-prob or entropy that is NaN or infinite at position {t} of row "
                f"{row.checksum}; expected finite numbers; load the model in float32 or bfloat16 and check its weights"
            )
