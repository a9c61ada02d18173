"""The trained copies of a cross-fit that is not finished: made once, kept until all rows are judged."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from qtarget.core.errors import CacheMismatchError, DataError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.crossfit.apart import train_apart
from qtarget.integrations.sft.crossfit.folds import Folds
from qtarget.integrations.sft.crossfit.jobs import CopyFiles, CopyJob
from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe, copy_settings
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.sources.distributed import Processes
from qtarget.storage.files import TEMPORARY

logger = logging.get_logger(__name__)


class Copies:
    """The trained copies of an unfinished cross-fit, one folder each: an adapter, or all weights.

    Args:
        folder: of all of them.
        progress: show a bar while one is trained.
        processes: train them side by side; absent: one after the other, in this process.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        args: QTargetConfig,
        folds: Folds,
        recipe: CrossfitRecipe,
        progress: bool,
        processes: Processes | None = None,
    ) -> None:
        given: Any = args.model_init_kwargs or {}
        self.files = CopyFiles(folder.resolve(), model, recipe.rank, {**given, "dtype": folds.dtype})
        self._args, self._folds, self._recipe = args, folds, recipe
        self._progress, self._processes = progress, processes
        self._seconds: list[float] = []

    def all_ready(self, wanted: Iterable[int]) -> list[str]:
        """The fingerprints of some; those that are not there are trained."""
        wanted = list(wanted)
        if self._processes is not None:
            jobs = [self._job(fold) for fold in wanted if not self.files.receipt(fold).is_file()]
            train_apart(jobs, self._folds.train, self._processes, self._progress, self._recipe.folds)
        return [self.ready(fold) for fold in wanted]

    def ready(self, fold: int) -> str:
        """The fingerprint of a copy, which is trained unless it is there already."""
        if not self.files.receipt(fold).is_file():
            self._train(fold)
        return self.files.fingerprint(fold)

    def expect(self, fingerprints: Mapping[int, str]) -> None:
        """Make sure that some are there, and are those that judged before; one that a finished cache let go is trained again.

        Raises:
            CacheMismatchError: one came out otherwise.
        """
        for fold, found in zip(fingerprints, self.all_ready(fingerprints), strict=True):
            if found != fingerprints[fold]:
                raise CacheMismatchError(
                    f"the copy of fold {fold + 1} was trained again and has the fingerprint {found}, expected "
                    f"{fingerprints[fold]}: sums on this device differ from run to run; delete the folder and score anew"
                )

    def load(self, fold: int, fingerprint: str) -> Any:
        """A copy that is as expected (see ``expect``), frozen, its adapter merged."""
        self.expect({fold: fingerprint})
        return self.files.load(self.files.path(fold))

    def are_there(self) -> bool:
        """Whether all are trained and kept."""
        return all(self.files.receipt(fold).is_file() for fold in range(self._recipe.folds))

    def _job(self, fold: int) -> CopyJob:
        kept = np.flatnonzero(np.asarray(self._folds.fold_of_train) != fold)
        if not len(kept):
            raise DataError(
                f"fold {fold + 1} holds every training row, so its copy has nothing to learn; give more rows, or fewer folds"
            )
        path = self.files.path(fold)
        settings = copy_settings(self._args, self._recipe, len(kept), path.with_name(path.name + TEMPORARY))
        return CopyJob(self.files, fold, settings, kept, self._folds.tokenizer)

    def _train(self, fold: int) -> None:
        job, begin, left = self._job(fold), time.perf_counter(), ""
        if self._seconds:
            missing = sum(not self.files.receipt(n).is_file() for n in range(self._recipe.folds))
            left = f", about {missing * sum(self._seconds) / len(self._seconds):,.0f} s of training left in all"
        logger.warning(
            f"cross-fit, fold {fold + 1} of {self._recipe.folds}: a copy learns {len(job.kept):,} rows in "
            f"{job.settings.max_steps:,} steps{left}"
        )
        with TokenMeter(self._progress, "training a copy", "steps") as meter:
            meter.start(job.settings.max_steps)
            job.run(self._folds.train, meter.advance)
        self._seconds.append(time.perf_counter() - begin)
