"""The rows of a config dealt into folds, and what there is to know of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qtarget.data.crossfit.folds import assign_folds, prompt_key
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe, stated
from qtarget.integrations.sft.score import training_rows
from qtarget.integrations.shared.heads import HeadSpec
from qtarget.scoring.cache.schema import fingerprint_model, row_checksum, supervised_mask
from qtarget.storage.files import digest


@dataclass(frozen=True)
class Folds:
    """The rows dealt out, and what there is to know of the base.

    Attributes:
        train: the training rows as the trainer prepared them.
        fold_of_train: ``[training rows]`` which copy judges each.
        rows: ``input_ids`` and ``labels`` of all rows, those of one fold together.
        by_checksum: the fold of each distinct row.
        seed: of the folds.
    """

    train: Any
    fold_of_train: Any
    rows: list[dict[str, Any]]
    by_checksum: dict[str, int]
    seed: int
    tokenizer: Any
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    base_fingerprint: str
    vocab_size: int
    dtype: torch.dtype
    head: HeadSpec

    def facts(self, recipe: CrossfitRecipe, args: QTargetConfig) -> dict[str, Any]:
        """What decides the numbers, as a manifest says it, but for the copies' fingerprints."""
        counts = [0] * recipe.folds
        for fold in self.by_checksum.values():
            counts[fold] += 1
        split = digest("".join(f"{checksum}{fold}" for checksum, fold in sorted(self.by_checksum.items())).encode())
        return {
            "folds": recipe.folds, "seed": self.seed, "base_fingerprint": self.base_fingerprint, "rows": counts,
            "split": split, "recipe": stated(recipe, args) | {"dtype": str(self.dtype).removeprefix("torch.")},
        }  # fmt: skip


def folds_of(
    model: str, args: QTargetConfig, train: Any, evals: Any, processing_class: Any, recipe: CrossfitRecipe
) -> Folds:
    job = training_rows(model, args, train, evals, processing_class)
    trainer, base = job.trainer, job.trainer._base_model()
    masks = [supervised_mask(row["labels"]) for row in job.rows]
    keys = [prompt_key(row["input_ids"], mask) for row, mask in zip(job.rows, masks, strict=True)]
    folds = assign_folds(keys, recipe.folds, args.seed)
    checksums = [row_checksum(row["input_ids"], mask) for row, mask in zip(job.rows, masks, strict=True)]
    prepared: Any = trainer.train_dataset
    order = sorted(range(len(folds)), key=lambda row: folds[row])  # stable: a fold's rows keep their order
    head: Any = base.get_output_embeddings()
    return Folds(
        train=prepared,
        fold_of_train=folds[: len(prepared)],
        rows=[job.rows[row] for row in order],
        by_checksum={checksum: int(fold) for checksum, fold in zip(checksums, folds, strict=True)},
        seed=args.seed,
        tokenizer=trainer.processing_class,
        tokenizer_fingerprint=job.tokenizer_fingerprint,
        chat_template_fingerprint=job.chat_template_fingerprint,
        base_fingerprint=fingerprint_model(base),
        vocab_size=head.weight.shape[0],
        dtype=base.dtype,
        head=trainer.head_spec,
    )
