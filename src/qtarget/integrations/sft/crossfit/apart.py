"""Copies that are trained, and judge, side by side in Ray's processes, all of which see the folder of copies."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features
from transformers.utils import logging

from qtarget.core.errors import CacheMismatchError, ConfigError, counted
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.crossfit.jobs import CopyFiles, CopyJob
from qtarget.integrations.sft.crossfit.source import CrossfitSource
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.rows import Row
from qtarget.scoring.cache.schema import Provenance, fingerprint_model
from qtarget.scoring.sources.distributed import Processes, SourcePool
from qtarget.scoring.sources.local import LocalSource
from qtarget.storage.locks import LOCK, Owner, read_owner

logger = logging.get_logger(__name__)

VISIBLE = 60.0
"""Seconds in which a folder that another machine made is seen here: network file systems remember what was not there."""


def train_apart(jobs: Sequence[CopyJob], train: Dataset, processes: Processes, progress: bool, folds: int) -> None:
    """Train copies side by side.

    Args:
        train: all training rows.
        progress: show a bar of all steps.
        folds: copies in all; one that is trained again alone must come out as beside the others.

    Raises:
        ConfigError: a machine of the cluster does not share the folder.
        ScoringServerError: a process died again and again.
    """
    if not jobs:
        return
    folder, steps = jobs[0].files.folder, sum(job.settings.max_steps for job in jobs)
    logger.warning(
        f"cross-fit: {counted(len(jobs), 'copy', 'copies')} of about {len(jobs[0].kept):,} rows each, {steps:,} steps in all, in "
        f"{counted(min(len(jobs), processes.workers), 'process', 'processes')} of Ray"
    )
    for job in jobs:
        _tally(job).unlink(missing_ok=True)
    with processes.connected(), TokenMeter(progress, "training copies", "steps") as meter:
        meter.start(steps)
        # one copy of the rows for all, in Ray's own memory: a memory-mapped file need not be there on another machine
        shared = processes.share(train.with_format("arrow")[:])
        owner, counter = read_owner(folder / LOCK), _Counter(jobs, meter)
        calls = processes.run(
            _train_here, len(jobs), lambda n: (jobs[n], shared, train.features, owner), counter.look, folds
        )
        with closing(calls):  # before Ray is left
            for done, (number, machine) in enumerate(calls, 1):
                _await(jobs[number].files.receipt(jobs[number].fold), machine)
                logger.warning(f"cross-fit: the copy of fold {jobs[number].fold + 1} is trained, {done} of {len(jobs)}")


class _Counter:
    """Steps of all copies, as their tallies tell."""

    def __init__(self, jobs: Sequence[CopyJob], meter: TokenMeter) -> None:
        self._jobs, self._meter, self._shown = jobs, meter, 0

    def look(self) -> None:
        tallies = [_tally(job) for job in self._jobs]
        found = sum(tally.stat().st_size for tally in tallies if tally.is_file())
        self._meter.advance(found - self._shown)
        self._shown = found


def _tally(job: CopyJob) -> Path:
    """A byte for each step."""
    return job.files.folder / f"fold-{job.fold}.steps"


def _train_here(job: CopyJob, table: Any, features: Features, owner: Owner | None) -> str:
    """What a process of Ray runs; the machine's name."""
    machine = platform.node()
    # the lock names the driver's process: a folder of the same name on a machine's own disk does not
    if owner is None or read_owner(job.files.folder / LOCK) != owner:
        raise not_shared(job.files.folder, machine)
    if job.files.receipt(job.fold).is_file():  # by a process that died between its last line and its answer
        return machine
    tally = _tally(job)
    tally.write_bytes(b"")

    def advance(steps: int) -> None:
        # a cluster may outlive the command that asked it, and the next command trains here, too
        if read_owner(job.files.folder / LOCK) != owner:
            raise ConfigError(f"{job.files.folder} belongs to another command now; this one ends")
        with tally.open("ab") as file:
            file.write(b"." * steps)

    job = at_home(job)
    job.run(Dataset(table, info=DatasetInfo(features=features)), advance)
    return machine


def at_home(job: CopyJob) -> CopyJob:
    """A job whose settings name this process's device in place of the driver's."""
    settings: QTargetConfig = job.settings
    vars(settings).pop("_setup_devices", None)  # cached by the driver (transformers 5.23)
    _ = settings.device
    return job


def _await(receipt: Path, machine: str) -> None:
    end = time.monotonic() + VISIBLE
    while not receipt.is_file():
        if time.monotonic() > end:
            raise not_shared(receipt.parent.parent, machine)
        time.sleep(0.5)


def not_shared(folder: Path, machine: str) -> ConfigError:
    """The error of a cluster without a common folder."""
    return ConfigError(
        f"{machine} does not share the folder {folder} with this process; expected an output folder on a path that all machines of "
        "the Ray cluster share, such as a network file system; name one: --output DIR"
    )


@dataclass(frozen=True)
class Judge:
    """Gives the source of a fold's copy, in any process.

    Attributes:
        fingerprints: of the copies, as the manifest says them.
        head: ``logit_scale`` and ``logit_softcap``.
    """

    files: CopyFiles
    fingerprints: tuple[str, ...]
    head: dict[str, Any]

    def __call__(self, fold: int) -> LocalSource:
        """Load the copy and compare it.

        Raises:
            ConfigError: this machine does not see it.
            CacheMismatchError: it is another one.
        """
        if not self.files.receipt(fold).is_file():
            raise not_shared(self.files.folder, platform.node())
        model = self.files.load(self.files.path(fold))
        if (found := fingerprint_model(model)) != self.fingerprints[fold]:
            raise CacheMismatchError(
                f"a worker loads a copy of fold {fold + 1} with fingerprint {found}, expected {self.fingerprints[fold]}; give "
                f"every machine the same base, or delete {self.files.path(fold)} and score again"
            )
        return LocalSource(model, **self.head)


class JudgePool(SourcePool):
    """Processes each of which is a ``CrossfitSource``.

    Args:
        folds: the fold of each row, by ``row_checksum``.
        expect: makes sure that the copies of some folds are there.
    """

    def __init__(
        self,
        folds: Mapping[str, int],
        judge: Judge,
        vocab_size: int,
        processes: Processes,
        expect: Callable[[Mapping[int, str]], None],
    ) -> None:
        super().__init__(partial(CrossfitSource, dict(folds), judge, vocab_size), vocab_size, processes)
        self._folds, self._judge, self._expect = folds, judge, expect

    def map_shards(self, work: Iterator[tuple[int, list[Row]]], plan: Provenance) -> Iterator[tuple[int, bytes]]:
        """See ``SourcePool``; copies that a finished cache let go are trained again, side by side, if a shard needs them."""
        return super().map_shards(self._with_copies(work), plan)

    def _with_copies(self, work: Iterator[tuple[int, list[Row]]]) -> Iterator[tuple[int, list[Row]]]:
        wanted = set[int]()
        for number, rows in work:
            wanted |= {self._folds[row.checksum] for row in rows}
            yield number, rows
        # all work is read before the first shard is judged
        self._expect({fold: self._judge.fingerprints[fold] for fold in sorted(wanted)})
