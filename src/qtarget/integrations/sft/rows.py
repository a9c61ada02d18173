"""Score any rows with a run's checkpoints, tokenised and masked as that run did it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.sft_config import SFTConfig

from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.trainer import QTargetTrainer
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


def score_checkpoints(
    checkpoints: Sequence[Path], rows: Dataset, settings: Mapping[str, Any], tokenizer_path: str | Path | None = None
) -> list[list[dict[str, Any]]]:
    """The rows in ``qtarget.report.runs.tokens`` form, once for each checkpoint.

    Args:
        checkpoints: folders with model (or adapter) and, unless given otherwise, tokenizer.
        settings: of the run; those in ``DATA_SETTINGS`` count, missing ones are TRL's defaults.
        tokenizer_path: where the tokenizer is, if not in the checkpoints.

    Raises:
        ConfigError: a checkpoint cannot be loaded.
        DataError: the rows are unusable.
    """
    known = {name: settings[name] for name in DATA_SETTINGS if name in settings and hasattr(SFTConfig, name)}
    scored, tokenised = [], None
    with tempfile.TemporaryDirectory() as folder:
        args = QTargetConfig(output_dir=folder, report_to=[], bf16=False, heatmap_rows=0, **known)
        for checkpoint in checkpoints:
            model = load_whole("checkpoint", str(checkpoint))
            tokenizer = load_named(AutoTokenizer, "checkpoint", str(tokenizer_path or checkpoint))
            trainer = QTargetTrainer(model, args, None, rows if tokenised is None else tokenised, None, tokenizer)
            tokenised = trainer.train_dataset
            ready: Any = tokenised
            plain = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ready]
            head = trainer.head_spec
            scored.append(
                scored_rows(trainer._base_model(), tokenizer, plain, logit_scale=head.scale, logit_softcap=head.softcap)
            )
    return scored
