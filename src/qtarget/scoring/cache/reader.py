"""Look up what the frozen model said: by checksum once, by row number ever after."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from qtarget.command import command_for, crossfit_command
from qtarget.core.errors import CacheMismatchError
from qtarget.scoring.cache.columns import expand
from qtarget.scoring.cache.decoded import LoadedShard, drop_damaged, load_shard, require_columns
from qtarget.scoring.cache.schema import Manifest, ShardRecord
from qtarget.scoring.cache.signature import check_signature
from qtarget.storage.files import digest_file

NAMED = 5
"""How many missing rows a message names."""


class ReferenceCache:
    """A finished reference cache, opened with ``ReferenceCache.open``.

    A shard is decoded into a side file when a row of its is first asked for, and mapped from there ever after (see
    ``qtarget.scoring.cache.decoded``): rows may be asked for in any order, and memory does not grow with the cache. Pickling
    sends path and manifest; a data loader's worker opens the folder again and maps the same files.

    Attributes:
        path: the folder.
        manifest: what the cache is of.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._starts = [0, *accumulate(shard.rows for shard in manifest.shards)]
        self._loaded: dict[int, LoadedShard] = {}
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True, key: bytes | None = None) -> ReferenceCache:
        """Open a cache and make sure that it is whole.

        Args:
            path: its folder.
            verify: compare every shard's hash (about a second a gigabyte); presence and size are checked in any case.
            key: the cache must be signed with it, see ``qtarget.scoring.cache.signature``; goes with ``verify``.

        Raises:
            CacheMismatchError: the manifest is unusable, or a shard is missing, truncated or altered.
        """
        path = Path(path).absolute()
        manifest = Manifest.read(path)
        if key is not None:
            check_signature(path, key)
        for shard in manifest.shards:
            check_shard(path, shard, verify)
            if verify:
                require_columns(path / shard.name, pq.read_schema(path / shard.name).names, manifest)
                drop_damaged(path, shard)
        return cls(path, manifest)

    @property
    def has_topk(self) -> bool:
        """Whether a distribution is stored: top-k log-probs, or draws."""
        return self.manifest.top_k > 0 or self.manifest.sampled > 0

    def __len__(self) -> int:
        return self.manifest.rows

    def require(
        self,
        *,
        model_fingerprint: str | None = None,
        tokenizer_fingerprint: str | None = None,
        chat_template_fingerprint: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Refuse to go on when the cache is of something else; an argument left out is not checked.

        The model of a cross-fitted cache is the one that its copies began as.

        Raises:
            CacheMismatchError: names each field that differs, found and expected, and the next step.
        """
        wanted = {
            "model_fingerprint": model_fingerprint,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "chat_template_fingerprint": chat_template_fingerprint,
            "vocab_size": vocab_size,
        }
        differing = [
            f"{name} is {said} in the cache, expected {value}"
            for name, value in wanted.items()
            if value is not None and (said := getattr(self.manifest, name.replace("model_", "base_"))) != value
        ]
        if differing:
            raise CacheMismatchError(
                f"{self.path} (of model {self.manifest.model_id!r}) does not fit: {'; '.join(differing)}; train with "
                "what was scored, or run `qtarget score CONFIG.yaml` into another folder and set it in the config"
            )

    def locate(self, checksums: Sequence[str], numbers: Sequence[int] | np.ndarray | None = None) -> list[int]:
        """Row numbers of some rows.

        Args:
            checksums: ``row_checksum`` of each.
            numbers: what messages call each; its number in ``checksums`` by default.

        Raises:
            CacheMismatchError: rows that were never scored, by their numbers, with the command.
        """
        found = self.find(checksums)
        missing = np.flatnonzero(found < 0)
        if numbers is not None:
            missing = np.asarray(numbers)[missing]
        if len(missing):
            named = ", ".join(str(row + 1) for row in missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            more = command_for("score", "--known", str(self.path), "--output", "more")
            step = f"score the rest with `{more}`, then join both with `qtarget cache merge {self.path} more --output both`"
            if self.manifest.crossfit:  # other rows make other copies
                step = f"have these rows judged by copies of their own: {crossfit_command('another')}"
            raise CacheMismatchError(
                f"{len(missing)} of {len(found)} rows are not in the cache {self.path}: rows {named}; their tokens or "
                f"their mask differ from every scored row; {step}"
            )
        return found.tolist()

    def find(self, checksums: Sequence[str]) -> np.ndarray:
        """Row numbers of some rows ``[rows]``, -1 for those that were never scored; ``locate`` refuses them."""
        ordered, numbers = self._checksums()
        if not len(checksums) or not len(ordered):
            return np.full(len(checksums), -1)
        wanted = np.array([checksum.encode() for checksum in checksums])
        # beyond the last one the place is past the end; the comparison below rejects it there
        place = np.searchsorted(ordered, wanted).clip(max=len(ordered) - 1)
        return np.where(ordered[place] == wanted, numbers[place], -1)

    def checksums(self) -> frozenset[str]:
        """The checksums of all rows."""
        return frozenset(value.decode() for value in self._checksums()[0])

    def row(self, index: int) -> dict[str, np.ndarray]:
        """The numbers of one row at its supervised tokens (``supervised_mask``), in nats; the caller owns the arrays.

        Returns:
            Of the manifest's columns ``label_log_probs [tokens]`` float32, ``entropy [tokens]`` float16; with top-k
            ``topk_ids [tokens, k]`` int32, ``topk_log_probs [tokens, k]`` (the manifest's ``log_probs_dtype``) and
            ``tail_log_mass [tokens]`` float32. Draws come as ``topk_ids`` and ``topk_log_probs`` too, see ``expand``.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a cache of {len(self)} rows; use locate(checksums)")
        number = bisect_right(self._starts, index) - 1
        shard = self._loaded.get(number)
        if shard is None:
            shard = self._loaded[number] = load_shard(self.path, self.manifest.shards[number], self.manifest)
        local = index - self._starts[number]
        begin, end = shard.offsets[local], shard.offsets[local + 1]
        row = {n: v[begin:end].copy() for n, v in shard.columns.items() if n not in ("sample_ids", "sample_counts")}
        if shard.drawn is not None:
            first, last = shard.drawn[local], shard.drawn[local + 1]
            ids, counts = (shard.columns[n][first:last] for n in ("sample_ids", "sample_counts"))
            row |= expand(row.pop("sample_sizes"), ids, counts)
        return row

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # hashes were compared by the process that pickled; another manifest means that the cache was written anew since
        opened = ReferenceCache.open(state["path"], verify=False)
        if opened.manifest != state["manifest"]:
            raise CacheMismatchError(f"{state['path']} was written again since it was opened; open it again")
        self.__dict__.update(opened.__dict__)

    def _checksums(self) -> tuple[np.ndarray, np.ndarray]:
        """Checksums, sorted, and the row number of each."""
        if self._index is None:
            found = [
                value.hex().encode()
                for shard in self.manifest.shards
                for value in pq.read_table(self.path / shard.name, columns=["checksum"])["checksum"].to_pylist()
            ]
            checksums = np.array(found)
            order = np.argsort(checksums)
            self._index = checksums[order], order
        return self._index


def check_shard(directory: Path, shard: ShardRecord, verify: bool) -> None:
    """Make sure that a shard's file is the one the manifest was written for.

    Raises:
        CacheMismatchError: it is missing, of another size, or of another content.
    """
    path = directory / shard.name
    again = "run the command that wrote it again: `qtarget score` scores this shard alone and keeps the others"
    if not path.exists():
        raise CacheMismatchError(f"{path} is missing; {again}")
    if (size := path.stat().st_size) != shard.bytes:
        raise CacheMismatchError(f"{path} has {size} bytes, expected {shard.bytes}; {again}")
    if verify and (found := digest_file(path)) != shard.blake2b:
        raise CacheMismatchError(f"{path} has the hash {found}, expected {shard.blake2b}; {again}")
