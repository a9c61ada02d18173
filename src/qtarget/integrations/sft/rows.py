"""Score any rows with a run's checkpoints, tokenised and masked as that run did it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import AutoTokenizer

from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.data.columns import ROW_IDS
from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.integrations.shared.heads import HeadSpec
from qtarget.report.runs.tokens import scored_rows
from qtarget.storage.models import load_named, load_whole

DATA_SETTINGS = (
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "chat_template_path",
    "eos_token",
    "pad_token",
)
"""Settings of a run that decide what its rows become."""
WEIGHT_SETTINGS = ("weights_scale", "unplaced_spans")
"""Those that decide what their weights leave out."""


def score_checkpoints(
    checkpoints: Sequence[Path], rows: Dataset, settings: Mapping[str, Any], tokenizer_path: str | Path | None = None
) -> list[list[dict[str, Any]]]:
    """The rows in ``qtarget.report.runs.tokens`` form, once for each checkpoint.

    Args:
        checkpoints: folders with model (or adapter) and, unless given otherwise, tokenizer.
        settings: of the run; those in ``DATA_SETTINGS`` and ``WEIGHT_SETTINGS`` count, missing ones are TRL's defaults.
        tokenizer_path: where the tokenizer is, if not in the checkpoints.

    Raises:
        ConfigError: a checkpoint cannot be loaded.
        DataError: the rows are unusable.
    """
    scored, tokenised = [], None
    for checkpoint in checkpoints:
        model = load_whole("checkpoint", str(checkpoint))
        tokenizer = load_named(AutoTokenizer, "checkpoint", str(tokenizer_path or checkpoint))
        ready = training_rows_of(model, tokenizer, rows if tokenised is None else tokenised, settings)
        tokenised = ready.dataset
        scored.append(ready.score(tokenizer))
    return scored


@dataclass(frozen=True)
class ReadyRows:
    """Rows as a run trains on them, and a model to score them with.

    Attributes:
        dataset: tokenised.
        rows: ``input_ids`` and ``labels`` each, and ``row``, its number in the data: rows whose every answer token lies
            beyond ``max_length``, or has weight 0, are not there.
        model: without its adapters' wrapper.
        head: scale and soft-cap.
    """

    dataset: Dataset
    rows: list[dict[str, Any]]
    model: Any
    head: HeadSpec

    def score(self, tokenizer: Any, chosen: slice = slice(None)) -> list[dict[str, Any]]:
        """See ``qtarget.report.runs.tokens.scored_rows``; some of the rows, all by default."""
        return scored_rows(
            self.model, tokenizer, self.rows[chosen], logit_scale=self.head.scale, logit_softcap=self.head.softcap
        )


def _masked(labels: Sequence[int], weights: Sequence[float] | None = None) -> Sequence[int]:
    """Labels without those of weight 0, which training leaves out."""
    return labels if weights is None else [-100 if w == 0 else y for y, w in zip(labels, weights, strict=True)]


class _Unlearnt(QTargetTrainer):
    """Makes rows as training would, and never trains: messages call them by what they are."""

    _rows_are: ClassVar[str] = "evaluation"


def training_rows_of(model: Any, tokenizer: Any, rows: Dataset, settings: Mapping[str, Any]) -> ReadyRows:
    """Tokenise and mask rows as a run with these settings does; the model is put where training would have it.

    Args:
        settings: those in ``DATA_SETTINGS`` and ``WEIGHT_SETTINGS`` count, missing ones are TRL's defaults.

    Raises:
        DataError: the rows are unusable.
    """
    known = {name: settings[name] for name in (*DATA_SETTINGS, *WEIGHT_SETTINGS) if name in settings}
    with tempfile.TemporaryDirectory() as folder:
        args = QTargetConfig(output_dir=folder, report_to=[], bf16=False, heatmap_rows=0, **known)
        trainer = _Unlearnt(model, args, None, rows, None, tokenizer)
    dataset: Any = trainer.train_dataset
    weights = ["loss_weights"] if args.weights_scale == "all" and "loss_weights" in dataset.column_names else []
    plain = [
        {
            "input_ids": row["input_ids"],
            "labels": _masked(row["labels"], row.get("loss_weights")),
            "row": row[ROW_IDS][0],
        }
        for row in dataset.select_columns(["input_ids", "labels", ROW_IDS, *weights])
    ]
    return ReadyRows(dataset, plain, trainer._base_model(), trainer.head_spec)
