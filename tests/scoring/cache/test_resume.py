"""A run that is stopped anywhere, and gone on with, ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from qtarget.core.errors import CacheMismatchError
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask
from qtarget.scoring.cache.writer import write_cache
from tests.scoring.helpers import PROCESSES, HashSource, contents, provenance, ragged_rows, score_and_log

ROWS = ragged_rows(26)
SHARD_ROWS = 4
KILLS = 10
FIRST_ROWS = [
    row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in ROWS[::SHARD_ROWS]
]  # a shard is known by its first row


class Stopped(BaseException):
    """Stands for a kill between two system calls."""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_stopped_at_every_rename(tmp_path, monkeypatch, moment):
    undisturbed = tmp_path / "undisturbed"
    write_cache(undisturbed, ROWS, HashSource(2), provenance(2), shard_rows=SHARD_ROWS)
    expected = contents(undisturbed)
    replace = os.replace
    renames = len(expected)
    for stop_at in range(renames):
        directory, calls = tmp_path / f"stopped-{stop_at}", []

        def stopping(source, target, calls=calls, stop_at=stop_at):
            calls.append(target)
            if moment == "before" and len(calls) > stop_at:
                raise Stopped
            replace(source, target)
            if len(calls) > stop_at:
                raise Stopped

        monkeypatch.setattr(os, "replace", stopping)
        with pytest.raises(Stopped):
            write_cache(directory, ROWS, HashSource(2), provenance(2), shard_rows=SHARD_ROWS)
        monkeypatch.setattr(os, "replace", replace)
        if directory.exists() and not (directory / "manifest.json").exists():
            with pytest.raises(CacheMismatchError, match="unfinished"):
                ReferenceCache.open(directory)
        finished = len(list(directory.glob("*.parquet")))
        source = HashSource(2)
        write_cache(directory, ROWS, source, provenance(2), shard_rows=SHARD_ROWS)
        assert contents(directory) == expected
        assert len(source.scored) == len(ROWS) - min(finished * SHARD_ROWS, len(ROWS))


def test_killed_at_random_moments(tmp_path):
    log, dice = tmp_path / "scored.log", random.Random(0)

    def start(name):
        log.write_text("")
        process = PROCESSES.Process(target=score_and_log, args=(tmp_path / name, log, ROWS, 3))
        process.start()
        return process

    start("undisturbed").join()
    assert log.read_text().split() == FIRST_ROWS
    expected = contents(tmp_path / "undisturbed")
    landed, name = [], 0
    for attempt in range(4 * KILLS):  # a fast machine outruns some kills
        directory = tmp_path / f"killed-{name}"
        before = finished_shards(directory)
        process = start(directory.name)
        if len(landed) < KILLS and attempt % 7 < 6:  # every seventh may run to its end
            until_scoring(process, log, dice.randint(0, 3))
            time.sleep(dice.uniform(0, 0.03))  # about what one shard takes
            process.kill()
        process.join()
        assert not before & set(log.read_text().split()), "a finished shard was scored again"
        assert before <= finished_shards(directory), "a finished shard was lost"
        if process.exitcode == -signal.SIGKILL:
            landed.append(len(finished_shards(directory)))
            continue
        assert process.exitcode == 0
        assert contents(directory) == expected
        name += 1
        if len(landed) >= KILLS:
            break
    assert len(landed) >= KILLS
    assert len(set(landed)) > 2, "kills landed at too few places to mean anything"


def until_scoring(process, log, shards):
    """Wait until the process has begun to score so many shards, or is done."""
    while process.is_alive() and len(log.read_text().split()) < shards:
        time.sleep(0.001)


def finished_shards(directory):
    """First rows of the shards whose file is in place: the rename is the last thing that happens to a shard."""
    return {FIRST_ROWS[int(path.stem[-5:])] for path in directory.glob("shard-*.parquet")}
