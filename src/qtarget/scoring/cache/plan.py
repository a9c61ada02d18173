"""What a scoring run is about to write: it decides which shards exist, and whether a folder may be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import qtarget
from qtarget.core.errors import CacheMismatchError, DataError, HyperparameterError
from qtarget.scoring.cache.rows import read_row
from qtarget.scoring.cache.schema import MANIFEST, Provenance
from qtarget.storage.files import digest, write_json

PLAN = "plan.json"
NAMED = 5
"""How many differences a message names."""


def tool_versions() -> dict[str, str]:
    """Versions of what computes and stores the numbers."""
    return {
        "qtarget": qtarget.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "pyarrow": version("pyarrow"),
    }


@dataclass(frozen=True)
class KeptRow:
    """An input row that is the first with its checksum: its place in the input, its checksum, its supervised tokens."""

    index: int
    checksum: str
    tokens: int


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be: its file, how much it holds, and the digest of its rows' checksums."""

    name: str
    rows: int
    tokens: int
    rows_digest: str


@dataclass(frozen=True, kw_only=True)
class Plan(Provenance):
    """``plan.json``: everything that decides the bytes of the cache, but for the machine and its batch size.

    Attributes:
        logit_scale, logit_softcap: of the model's head.
        shard_rows: rows a shard; the last may hold fewer.
        shards: in row order.
    """

    logit_scale: float
    logit_softcap: float | None
    shard_rows: int
    shards: tuple[PlannedShard, ...]

    @property
    def tokens(self) -> int:
        """Supervised tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)


def distinct_rows(rows: Sequence[Mapping[str, Any]], vocab_size: int) -> list[KeptRow]:
    """The input rows without repetitions, in their order.

    Raises:
        DataError: a row is unusable (see ``read_row``), there are none, or none has a supervised token.
    """
    kept: dict[str, KeptRow] = {}
    for index in range(len(rows)):
        row = read_row(rows[index], index, vocab_size)
        kept.setdefault(row.checksum, KeptRow(index, row.checksum, len(row.positions)))
    if not any(row.tokens for row in kept.values()):
        raise DataError(
            f"none of the {len(rows)} rows has a supervised token (a label other than -100 after position 0); "
            "check the mask"
        )
    return list(kept.values())


def plan_shards(kept: Sequence[KeptRow], shard_rows: int) -> tuple[PlannedShard, ...]:
    """Fixed ranges of ``shard_rows`` rows.

    Raises:
        HyperparameterError: ``shard_rows`` is not positive.
    """
    if shard_rows < 1:
        raise HyperparameterError(f"shard_rows={shard_rows}; expected at least 1")
    shards = []
    for number, start in enumerate(range(0, len(kept), shard_rows)):
        part = kept[start : start + shard_rows]
        rows_digest = digest("".join(row.checksum for row in part).encode())
        shards.append(PlannedShard(f"shard-{number:05d}.parquet", len(part), sum(r.tokens for r in part), rows_digest))
    return tuple(shards)


def adopt_plan(directory: Path, plan: Plan) -> None:
    """Write the plan into an empty folder, or make sure that the folder was begun with the same one.

    Raises:
        CacheMismatchError: the folder holds another plan (says what differs), an unreadable one, or shards and none.
    """
    path = directory / PLAN
    # tuples become lists, as they are in the file
    ours = json.loads(json.dumps(asdict(plan)))
    if not path.exists():
        if (directory / MANIFEST).exists() or any(directory.glob("shard-*.parquet")):
            raise CacheMismatchError(
                f"{directory} holds shards without a {PLAN}; choose another folder or delete this one"
            )
        write_json(path, ours)
        return
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = _differences(theirs, ours)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise CacheMismatchError(f"{path} is unreadable ({error}); choose another folder or delete this one") from error
    if differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        raise CacheMismatchError(
            f"{directory} was begun with another plan: {'; '.join(differing[:NAMED])}{more}; choose another folder, "
            "or delete this one, and run the same command again"
        )


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What differs between two plans, one phrase each; shards only when nothing else explains them."""
    named = [
        f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} now"
        for key in sorted({*theirs, *ours} - {"shards"})
        if theirs.get(key) != ours.get(key)
    ]
    if named or theirs["shards"] == ours["shards"]:
        return named
    there, now = (sum(s["rows"] for s in plan["shards"]) for plan in (theirs, ours))
    if there != now:
        named.append(f"it has {there} distinct rows there and {now} now")
    # another number of shards is another number of rows, which is told above
    pairs = zip(theirs["shards"], ours["shards"], strict=False)
    return named + [f"{a['name']} has other rows" for a, b in pairs if a != b]
