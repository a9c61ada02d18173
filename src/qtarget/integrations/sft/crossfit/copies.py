"""The trained copies of a cross-fit that is not finished: made once, kept until all rows are judged."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from qtarget.core.errors import CacheMismatchError, DataError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.crossfit.folds import Folds
from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe, copy_settings
from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.scoring.sources.distributed import load_model
from qtarget.storage.files import TEMPORARY, write_json

logger = logging.get_logger(__name__)

RECEIPT = "copy.json"


class Copies:
    """The trained copies of an unfinished cross-fit, one folder each: an adapter, or all weights.

    Args:
        folder: of all of them.
        progress: show a bar while one is trained.
    """

    def __init__(
        self, folder: Path, model: str, args: QTargetConfig, folds: Folds, recipe: CrossfitRecipe, progress: bool
    ) -> None:
        self._folder, self._model, self._args = folder, model, args
        self._folds, self._recipe, self._progress = folds, recipe, progress
        self._seconds: list[float] = []

    def ready(self, fold: int) -> str:
        """The fingerprint of a copy, which is trained unless it is there already."""
        if not (self._path(fold) / RECEIPT).is_file():
            self._train(fold)
        return json.loads((self._path(fold) / RECEIPT).read_text(encoding="utf-8"))["fingerprint"]

    def load(self, fold: int, fingerprint: str) -> Any:
        """A copy, frozen, its adapter merged; trained again where a finished cache let it go.

        Raises:
            CacheMismatchError: it came out otherwise than the one that judged before.
        """
        if (found := self.ready(fold)) != fingerprint:
            raise CacheMismatchError(
                f"the copy of fold {fold + 1} was trained again and has the fingerprint {found}, expected {fingerprint}: sums on "
                "this device differ from run to run; delete the folder and score anew"
            )
        return self._loaded(self._path(fold))

    def are_there(self) -> bool:
        """Whether all are trained and kept."""
        return all((self._path(fold) / RECEIPT).is_file() for fold in range(self._recipe.folds))

    def _path(self, fold: int) -> Path:
        return self._folder / f"fold-{fold}"

    def _loaded(self, path: Path) -> Any:
        given: Any = self._args.model_init_kwargs or {}
        options = {**given, "dtype": self._folds.dtype}
        if not self._recipe.rank:
            return load_model(str(path), **{k: v for k, v in options.items() if k != "revision"})
        from peft import PeftModel

        base = load_model(self._model, **options)
        return PeftModel.from_pretrained(base, str(path)).merge_and_unload().eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]

    def _train(self, fold: int) -> None:
        path, begin = self._path(fold), time.perf_counter()
        unfinished = path.with_name(path.name + TEMPORARY)
        for leftover in (path, unfinished):
            shutil.rmtree(leftover, ignore_errors=True)
        kept = [row for row, other in enumerate(self._folds.fold_of_train) if other != fold]
        if not kept:
            raise DataError(
                f"fold {fold + 1} holds every training row, so its copy has nothing to learn; give more rows, or fewer folds"
            )
        settings = copy_settings(self._args, self._recipe, len(kept), unfinished)
        left = ""
        if self._seconds:
            missing = sum(not (self._path(n) / RECEIPT).is_file() for n in range(self._recipe.folds))
            left = f", about {missing * sum(self._seconds) / len(self._seconds):,.0f} s of training left in all"
        logger.warning(
            f"cross-fit, fold {fold + 1} of {self._recipe.folds}: a copy learns {len(kept):,} rows in {settings.max_steps:,} "
            f"steps{left}"
        )
        rows = self._folds.train.select(kept)
        loss = train_copy(
            self._model, settings, rows, self._folds.tokenizer, self._recipe.rank, unfinished, self._progress
        )
        model = self._loaded(unfinished)
        fingerprint = fingerprint_model(model)
        del model
        facts = {"fingerprint": fingerprint, "steps": settings.max_steps, "rows": len(kept), "training_loss": loss}
        write_json(unfinished / RECEIPT, facts)
        unfinished.rename(path)
        self._seconds.append(time.perf_counter() - begin)


def train_copy(
    model: str, settings: QTargetConfig, rows: Any, tokenizer: Any, rank: int, folder: Path, progress: bool
) -> float:
    """Train one copy, save it, and let it go; its mean training loss."""
    adapter = None
    if rank:
        from peft import LoraConfig

        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = QTargetTrainer(model, settings, None, rows, None, tokenizer, peft_config=adapter)
    with TokenMeter(progress, "training a copy", "steps") as meter:
        meter.start(settings.max_steps)
        trainer.add_callback(_Steps(meter.advance))
        trainer.remove_callback(PrinterCallback)  # it stands in for the bar that is off, and would print a dictionary
        loss = trainer.train().training_loss
    saved: Any = trainer.accelerator.unwrap_model(trainer.model)
    saved.save_pretrained(str(folder))
    del trainer, saved
    gc.collect()  # the trainer and its callbacks hold each other; the next model is loaded now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return float(loss)


class _Steps(TrainerCallback):
    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
