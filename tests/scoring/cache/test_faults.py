"""What happens to a cache: a full disk, damage, an older version, more of it than memory. Nothing finished is lost."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import tempfile
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qtarget.benchmarks.scoring.cache import CacheConfig, SyntheticTeacher, modes
from qtarget.benchmarks.scoring.cache import provenance as provenance_of
from qtarget.benchmarks.scoring.reading import anonymous_memory
from qtarget.core.errors import CacheMismatchError, ConfigError, StorageError
from qtarget.scoring.cache import decoded
from qtarget.scoring.cache.columns import compact
from qtarget.scoring.cache.decoded import side_file
from qtarget.scoring.cache.merge import merge_caches
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import read_row
from qtarget.scoring.cache.schema import DECODED, row_checksum, size_on_disk, supervised_mask
from qtarget.scoring.cache.verify import check_counts, rescore, shared_places
from qtarget.scoring.cache.writer import write_cache
from qtarget.storage.files import digest_file
from qtarget.storage.locks import locked
from tests.scoring.helpers import PROCESSES, VOCAB, HashSource, contents, provenance, ragged_rows

ROWS = ragged_rows(11)


def checksums(rows):
    return [row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in rows]


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", ROWS, HashSource(3), provenance(3), shard_rows=4)
    return tmp_path / "cache"


def assert_says_what_was_scored(cache, source):
    for i, row in enumerate(ROWS):
        expected, found = source.numbers(read_row(row, i, VOCAB)), cache.row(i)
        np.testing.assert_array_equal(found["label_log_probs"], expected.label_log_probs)
        np.testing.assert_array_equal(found["topk_ids"], expected.topk_ids)


# -- a full disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writes", [0, 1, 3, 4])
def test_a_full_disk_keeps_what_is_finished(tmp_path, cache, monkeypatch, writes):
    """The disk is full from the nth sync on; afterwards the run goes on and ends with the same bytes."""
    expected, directory = contents(cache), tmp_path / "other"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 2 * writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device.*what is finished is kept"):
        write_cache(directory, ROWS, HashSource(3), provenance(3), shard_rows=4)
    assert not list(directory.glob("*.tmp")), "a full disk gets its space back"
    finished = len(list(directory.glob("shard-*.parquet")))
    monkeypatch.setattr(os, "fsync", real)
    source = HashSource(3)
    write_cache(directory, ROWS, source, provenance(3), shard_rows=4)
    assert len(source.scored) == len(ROWS) - 4 * finished
    assert contents(directory) == expected


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 64 KiB in memory, where mounting is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        with pytest.raises(StorageError, match="No space left on device"):
            write_cache(small / "cache", ragged_rows(400), HashSource(3), provenance(3), shard_rows=20)
        finished = len(list((small / "cache").glob("shard-*.parquet")))
        assert finished
        subprocess.run(["mount", "-o", "remount,size=2m", str(small)], check=True)
        source = HashSource(3)
        write_cache(small / "cache", ragged_rows(400), source, provenance(3), shard_rows=20)
        assert len(source.scored) == 400 - 20 * finished
        check_counts(ReferenceCache.open(small / "cache"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -- decoded side files ------------------------------------------------------------------------------------------


def test_side_files_are_made_once_and_shared(cache):
    opened = ReferenceCache.open(cache)
    assert not (cache / DECODED).exists()
    before = size_on_disk(cache)
    assert_says_what_was_scored(opened, HashSource(3))
    files = {p: p.stat().st_mtime_ns for p in (cache / DECODED).glob("*.arrow")}
    assert len(files) == 3
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    assert files == {p: p.stat().st_mtime_ns for p in (cache / DECODED).glob("*.arrow")}
    assert size_on_disk(cache) == before, "side files are no part of the cache"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty receipt", "half a receipt"])
def test_damaged_side_files_are_made_again(cache, damage):
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    opened = ReferenceCache.open(cache)
    path = side_file(opened.path, opened.manifest.shards[1])
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        path.write_bytes(content[:400] + bytes([content[400] ^ 255]) + content[401:])
    elif damage == "remove":
        path.unlink()
    elif damage == "empty receipt":
        path.with_suffix(".json").write_text("")
    else:
        path.with_suffix(".json").write_text(json.dumps({"bytes": len(content)}))
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    assert path.read_bytes() == content


def test_a_side_file_made_again_meanwhile_stays(cache, monkeypatch):
    """One process finds it damaged; before it can delete it, another one has put a good one in its place."""
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    path = side_file(cache, ReferenceCache.open(cache).manifest.shards[1])
    content = path.read_bytes()
    path.write_bytes(content[:400] + bytes([content[400] ^ 255]) + content[401:])

    def read_and_lose_the_race(file):
        found = digest_file(file)
        if file == path:
            path.write_bytes(content)
        return found

    monkeypatch.setattr(decoded, "digest_file", read_and_lose_the_race)
    ReferenceCache.open(cache)
    assert path.read_bytes() == content


def test_a_side_file_that_goes_before_it_is_mapped_is_made_again(cache, monkeypatch):
    """Another process deletes a damaged one between our look at it and its mapping; the lock keeps it from doing so."""
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    held = []

    def mapped(path):
        with (cache / DECODED / ".lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path)
        return pa.OSFile(path)

    monkeypatch.setattr(pa, "memory_map", mapped)
    ReferenceCache.open(cache).row(0)
    assert len(held) == 1


@pytest.fixture
def shared(cache, tmp_path, monkeypatch):
    """The cache cannot be written to; gives where its side files go, in a temporary folder that others share."""
    temporary, may = tmp_path / "shared", os.access
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK) and may(path, mode))
    return temporary / f"qtarget-decoded-{os.getuid()}"


def test_side_files_of_a_read_only_cache_are_ours_alone(cache, shared):
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))
    assert not (cache / DECODED).exists()
    assert shared.stat().st_mode & 0o777 == 0o700
    assert len(list(shared.glob("*.arrow"))) == 3
    shared.chmod(0o755)  # may be read by others, as earlier versions made it
    assert_says_what_was_scored(ReferenceCache.open(cache), HashSource(3))


@pytest.mark.parametrize(
    ("planted", "words"),
    [("link", "is no folder"), ("file", "is no folder"), ("group", "mode 775"), ("others", "mode 707"),
     ("another", "belongs to user")],
)  # fmt: skip
def test_side_files_that_another_user_may_have_made_are_not_read(cache, shared, planted, words, monkeypatch):
    if planted == "link":
        (shared.parent / "elsewhere").mkdir()
        shared.symlink_to(shared.parent / "elsewhere")
    elif planted == "file":
        shared.write_text("")
    else:
        shared.mkdir(mode=0o700)
        shared.chmod({"group": 0o775, "others": 0o707}.get(planted, 0o755))
    if planted == "another":
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
        shared.rename(shared.with_name(f"qtarget-decoded-{user + 1}"))
    with pytest.raises(StorageError, match=rf"{words}.*remove it, or set TMPDIR"):
        ReferenceCache.open(cache, verify=False).row(0)


def test_side_files_of_an_earlier_cache_go(cache):
    ReferenceCache.open(cache).row(0)
    for path in cache.iterdir():
        if path.is_file():
            path.unlink()
    write_cache(cache, ROWS[::-1], HashSource(3), provenance(3), shard_rows=4)
    opened = ReferenceCache.open(cache)
    opened.row(0)
    assert [p.stem for p in (cache / DECODED).glob("*.arrow")] == [opened.manifest.shards[0].blake2b]


def read_all(path, order, found):
    cache = ReferenceCache.open(path, verify=False)
    found.put({i: cache.row(i)["label_log_probs"].tolist() for i in order})


def test_several_workers_decode_at_once(cache):
    answers, order = PROCESSES.Queue(), np.random.default_rng(0).permutation(len(ROWS)).tolist()
    workers = [PROCESSES.Process(target=read_all, args=(cache, order[i:] + order[:i], answers)) for i in range(3)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = {
        i: HashSource(3).numbers(read_row(row, i, VOCAB)).label_log_probs.tolist() for i, row in enumerate(ROWS)
    }
    assert found == [expected] * 3


def read_all_and_measure(path, answer):
    cache = ReferenceCache.open(path, verify=False)
    cache.row(0)
    before, total = anonymous_memory(), 0.0
    for index in np.random.default_rng(0).permutation(len(cache)):
        total += float(cache.row(int(index))["topk_log_probs"].astype(np.float64).sum())
    answer.put((total, anonymous_memory() - before))


def test_a_cache_is_read_without_its_bytes_in_memory(tmp_path):
    """24 MiB of decoded numbers, read in shuffled order by a process whose own memory grows by less than 8 MiB."""
    rows = [
        {"input_ids": row, "labels": row} for row in np.random.default_rng(0).integers(0, VOCAB, (600, 200)).tolist()
    ]
    write_cache(tmp_path, rows, HashSource(32), provenance(32), shard_rows=100)
    cache = ReferenceCache.open(tmp_path)
    expected = sum(float(cache.row(i)["topk_log_probs"].astype(np.float64).sum()) for i in range(len(cache)))
    assert sum(p.stat().st_size for p in (tmp_path / DECODED).glob("*.arrow")) > 24 * 2**20
    answer = PROCESSES.Queue()
    worker = PROCESSES.Process(target=read_all_and_measure, args=(tmp_path, answer))
    worker.start()
    total, grown = answer.get(timeout=60)
    worker.join()
    assert total == pytest.approx(expected)
    assert grown < 8 * 2**20, f"{grown} bytes of memory that belong to no file"


# -- another version ---------------------------------------------------------------------------------------------


def test_a_cache_of_version_1_is_read(cache, tmp_path):
    """Rebuilt as version 1 wrote it: float16 as they are, a manifest that says less."""
    old = tmp_path / "old"
    old.mkdir()
    manifest = json.loads((cache / "manifest.json").read_text())
    shards, place = [], 0
    for record in manifest["shards"]:
        part = [HashSource(3).numbers(read_row(row, i, VOCAB)) for i, row in enumerate(ROWS)][
            place : place + record["rows"]
        ]
        columns = {"checksum": pa.array([bytes.fromhex(c) for c in checksums(ROWS)][place : place + record["rows"]])}
        for name, dtype in (
            ("label_log_probs", "f4"), ("entropy", "f2"), ("topk_ids", "i4"), ("topk_log_probs", "f2"), ("tail_log_mass", "f4"),
        ):  # fmt: skip
            values = [getattr(numbers, name).astype(dtype) for numbers in part]
            offsets = np.cumsum([0, *(v.size for v in values)])
            columns[name] = pa.LargeListArray.from_arrays(offsets, np.concatenate([v.reshape(-1) for v in values]))
        pq.write_table(pa.table(columns), old / record["name"])
        content = (old / record["name"]).read_bytes()
        import hashlib

        shards.append(
            {**record, "bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}
        )
        place += record["rows"]
    for name in ("columns", "sampled", "seed", "engine", "engine_version"):
        del manifest[name]
    (old / "manifest.json").write_text(
        json.dumps({**manifest, "shards": shards, "schema_version": 1, "log_probs_dtype": "float16"})
    )
    opened = ReferenceCache.open(old)
    assert_says_what_was_scored(opened, HashSource(3))
    for i, row in enumerate(ROWS):
        expected = HashSource(3).numbers(read_row(row, i, VOCAB)).topk_log_probs.astype(np.float16)
        np.testing.assert_array_equal(opened.row(i)["topk_log_probs"], expected)
    with pytest.raises(CacheMismatchError, match="schema_version is 2, expected 1"):
        merge_caches([old, cache], tmp_path / "both")


def test_a_source_that_stops_telling_entropy_is_refused(tmp_path):
    class Moody(HashSource):
        def score(self, *arguments, **named):
            found = super().score(*arguments, **named)
            return found if len(self.scored) < 5 else [replace(numbers, entropy=None) for numbers in found]

    with pytest.raises(CacheMismatchError, match=r"shard-00001.parquet holds label_log_probs, the shards before it"):
        write_cache(tmp_path, ROWS, Moody(), provenance(), shard_rows=4)


# -- merge, verify, the rest -------------------------------------------------------------------------------------


def test_merged_caches_hold_every_row_once(tmp_path):
    parts = [ROWS[:5], ROWS[3:8], ROWS[8:]]
    for i, part in enumerate(parts):
        write_cache(tmp_path / f"{i}", part, HashSource(3), provenance(3, model_id=f"name {i}"), shard_rows=2)
    manifest = merge_caches([tmp_path / "0", tmp_path / "1", tmp_path / "2"], tmp_path / "all")
    merged = ReferenceCache.open(tmp_path / "all")
    check_counts(merged)
    assert (manifest.rows, merged.locate(checksums(ROWS))) == (11, list(range(11)))
    assert_says_what_was_scored(merged, HashSource(3))
    with pytest.raises(ConfigError, match="exists already"):
        merge_caches([tmp_path / "0", tmp_path / "1"], tmp_path / "all")


def test_two_merges_into_one_folder(tmp_path, cache):
    """The second is refused and leaves the first one's files alone; what a killed one left is no hindrance."""
    write_cache(tmp_path / "more", ragged_rows(3, seed=5), HashSource(3), provenance(3))
    building = tmp_path / "all.tmp"
    building.mkdir()
    (building / "shard-00000.parquet").write_bytes(b"half")
    with locked(building), pytest.raises(ConfigError, match=r"another process is writing .*all.tmp.* wait for it"):
        merge_caches([cache, tmp_path / "more"], tmp_path / "all")
    assert (building / "shard-00000.parquet").read_bytes() == b"half"
    merge_caches([cache, tmp_path / "more"], tmp_path / "all")
    check_counts(ReferenceCache.open(tmp_path / "all"))
    assert not building.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_fingerprint", "other"), ("tokenizer_fingerprint", "b"), ("dtype", "bfloat16"), ("top_k", 2)],
)
def test_unlike_caches_are_not_merged(tmp_path, cache, field, value):
    other = provenance(**{"top_k": 3, field: value})
    write_cache(tmp_path / "other", ragged_rows(3, seed=5), HashSource(other.top_k), other)
    expected = getattr(ReferenceCache.open(cache).manifest, field)
    with pytest.raises(CacheMismatchError, match=f"{field} is {value!r}, expected {expected!r}"):
        merge_caches([cache, tmp_path / "other"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_the_rest_is_scored_and_joined(tmp_path):
    write_cache(tmp_path / "old", ROWS[:6], HashSource(3), provenance(3))
    with pytest.raises(
        CacheMismatchError, match=r"5 of 11 rows .*--known .*old --output more.*qtarget cache merge"
    ) as caught:
        ReferenceCache.open(tmp_path / "old").locate(checksums(ROWS))
    assert "rows 7, 8, 9, 10, 11;" in str(caught.value)
    source = HashSource(3)
    write_cache(tmp_path / "more", ROWS, source, provenance(3), known=ReferenceCache.open(tmp_path / "old").checksums())
    assert source.scored == checksums(ROWS[6:])
    merge_caches([tmp_path / "old", tmp_path / "more"], tmp_path / "both")
    assert_says_what_was_scored(ReferenceCache.open(tmp_path / "both"), HashSource(3))


def test_rescoring_tells_the_largest_difference(cache):
    class Off(HashSource):
        def numbers(self, row):
            found = super().numbers(row)
            return replace(
                found, label_log_probs=found.label_log_probs - 0.25, topk_log_probs=found.topk_log_probs + 0.5
            )

    opened = ReferenceCache.open(cache)
    same = rescore(opened, HashSource(3), ROWS, count=4)
    assert (same["label_log_probs"], same["tail_log_mass"], same["topk_ids_missing_share"]) == (0, 0, 0)
    assert same["entropy"] <= 2**-11
    found = rescore(opened, Off(3), ROWS, count=4)
    assert found["label_log_probs"] == pytest.approx(0.25, abs=1e-6)
    assert found["topk_log_probs"] >= 0.5 - 1e-6


def test_a_difference_beside_banned_tokens_is_seen(tmp_path):
    """Stored as the lowest half-precision number, scored as minus infinity: no difference, and it hides none."""

    class Banned(HashSource):
        lower = 0.0

        def numbers(self, row):
            found = super().numbers(row)
            ids = np.arange(3, dtype=np.int32) + np.zeros_like(found.topk_ids)
            found.topk_log_probs[:, 0] -= self.lower
            found.topk_log_probs[:, 2] = found.tail_log_mass[:1] = -np.inf
            return replace(found, topk_ids=ids, tail_log_mass=found.tail_log_mass - np.float32(self.lower))

    write_cache(tmp_path, ROWS, Banned(3), provenance(3))
    opened, now = ReferenceCache.open(tmp_path), Banned(3)
    same = rescore(opened, now, ROWS)
    assert (same["topk_log_probs"], same["tail_log_mass"]) == (0, 0)
    now.lower = 0.25
    found = rescore(opened, now, ROWS)
    assert found["topk_log_probs"] == pytest.approx(0.25, abs=1e-6)
    assert found["tail_log_mass"] == pytest.approx(0.25, abs=1e-6)
    now.lower = float("nan")
    assert rescore(opened, now, ROWS)["topk_log_probs"] == np.inf


def test_half_precision_far_down_is_rounding_not_a_difference(tmp_path):
    class Deep(HashSource):
        lower = 0.0

        def numbers(self, row):
            found = super().numbers(row)
            ids = np.arange(3, dtype=np.int32) + np.zeros_like(found.topk_ids)
            log_probs = np.sort(found.topk_log_probs * 1000)[:, ::-1] - self.lower
            return replace(found, topk_ids=ids, topk_log_probs=log_probs.astype(np.float32))

    write_cache(tmp_path, ROWS, Deep(3), provenance(3, log_probs_dtype="float16"))
    opened, now = ReferenceCache.open(tmp_path), Deep(3)
    raw = [np.abs(opened.row(i)["topk_log_probs"] - now.numbers(read_row(r, i, VOCAB)).topk_log_probs).max()
           for i, r in enumerate(ROWS) if any(mark != -100 for mark in r["labels"][1:])]  # fmt: skip
    assert max(raw) > 0.02, "half precision alone moves them by more than the tolerance"
    assert all(value == 0 for value in rescore(opened, now, ROWS).values())
    now.lower = 1.0
    assert 0.5 < rescore(opened, now, ROWS)["topk_log_probs"] < 1.5


def test_ids_are_matched_token_by_token():
    rng = np.random.default_rng(0)
    ours, theirs = (np.stack([rng.permutation(40)[:12] for _ in range(30)]) for _ in range(2))
    ours[:, 9:] = -1
    theirs[::2, 7:] = -1
    here, there, share = shared_places(ours, theirs)
    pairs = [(t, i, j) for t in range(30) for i in range(12) for j in range(12) if ours[t, i] == theirs[t, j] >= 0]
    assert sorted(zip(here.tolist(), there.tolist(), strict=True)) == [(12 * t + i, 12 * t + j) for t, i, j in pairs]
    assert share == pytest.approx(len(pairs) / (30 * 9))


# -- bytes -------------------------------------------------------------------------------------------------------


def test_bytes_a_token(tmp_path):
    """The documentation's promises at a vocabulary of 152k: what 256 more tokens of the benchmark's teacher take."""
    teacher = SyntheticTeacher(CacheConfig("", tokens=512), 256)
    sizes: dict[str, float] = {}
    for mode in modes(50):
        for count in (1, 2):
            folder = tmp_path / f"{mode.name}-{count}"
            write_cache(folder, teacher.rows[:count], teacher, provenance_of(mode, teacher.vocab_size))
            sizes[mode.name] = (size_on_disk(folder) - sizes.get(mode.name, 0)) if count == 2 else size_on_disk(folder)
    assert sizes["label statistics"] / 256 < 5
    assert sizes["top 32"] / 256 < 110
    assert sizes["50 draws"] / 256 < 40
    distinct = [compact(draws).sizes.mean() for _, draws in teacher._numbers.values()]
    assert 9 < np.mean(distinct) < 15
