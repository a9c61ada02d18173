"""One copy: trained, placed whole, and loaded again; in this process or another."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.scoring.sources.distributed import load_model
from qtarget.storage.files import write_json

RECEIPT = "copy.json"


@dataclass(frozen=True)
class CopyFiles:
    """Where copies are kept, and how they are loaded again; travels between processes.

    Attributes:
        folder: of all of them; a folder each is in it.
        model: name or path of the base.
        rank: of LoRA; 0 for all weights.
        options: for loading the base.
    """

    folder: Path
    model: str
    rank: int
    options: dict[str, Any]

    def path(self, fold: int) -> Path:
        """An adapter, or all weights."""
        return self.folder / f"fold-{fold}"

    def receipt(self, fold: int) -> Path:
        """Written when all else of a copy is."""
        return self.path(fold) / RECEIPT

    def fingerprint(self, fold: int) -> str:
        """What the receipt says."""
        return json.loads(self.receipt(fold).read_text(encoding="utf-8"))["fingerprint"]

    def load(self, path: Path) -> Any:
        """A copy, frozen, its adapter merged."""
        if not self.rank:
            return load_model(str(path), **{k: v for k, v in self.options.items() if k != "revision"})
        from peft import PeftModel

        base = load_model(self.model, **self.options)
        return PeftModel.from_pretrained(base, str(path)).merge_and_unload().eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True)
class CopyJob:
    """All that it takes to train one copy, but for the rows; travels between processes.

    Attributes:
        kept: the training rows that it learns.
    """

    files: CopyFiles
    fold: int
    settings: QTargetConfig
    kept: np.ndarray
    tokenizer: Any

    def run(self, train: Any, advance: Callable[[int], None]) -> str:
        """Train the copy, place it whole, and give its fingerprint.

        Args:
            train: all training rows.
            advance: told of each step.
        """
        path, unfinished = self.files.path(self.fold), Path(str(self.settings.output_dir))
        for leftover in (path, unfinished):
            shutil.rmtree(leftover, ignore_errors=True)
        loss = train_copy(
            self.files.model,
            self.settings,
            train.select(self.kept),
            self.tokenizer,
            self.files.rank,
            unfinished,
            advance,
        )
        model = self.files.load(unfinished)
        fingerprint = fingerprint_model(model)
        del model
        facts = {"steps": self.settings.max_steps, "rows": len(self.kept), "training_loss": loss}
        write_json(unfinished / RECEIPT, {"fingerprint": fingerprint, **facts})
        unfinished.rename(path)
        return fingerprint


def train_copy(
    model: str,
    settings: QTargetConfig,
    rows: Any,
    tokenizer: Any,
    rank: int,
    folder: Path,
    advance: Callable[[int], None],
) -> float:
    """Train one copy, save it, and let it go; its mean training loss."""
    adapter = None
    if rank:
        from peft import LoraConfig

        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = QTargetTrainer(model, settings, None, rows, None, tokenizer, peft_config=adapter)
    trainer.add_callback(_Steps(advance))
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
