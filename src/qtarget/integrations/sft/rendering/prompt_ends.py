"""Prompts whose end changes when the completion follows: TRL says so of one row, once; here all such rows are named."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from datasets import Dataset
from trl.data_utils import _tokenize
from trl.trainer import sft_trainer

from qtarget.data.checks.findings import Finding, finding
from qtarget.integrations.sft.data.columns import ROW
from qtarget.integrations.sft.rendering.renderer import Renderer

TRL_LOGGER = "trl.trainer.sft_trainer"
TRL_WORDS = "The tokenized prompt is not a prefix of the tokenized prompt+completion"
"""How TRL's warning begins, behind accelerate's rank (TRL 1.16)."""


@contextmanager
def held_back() -> Iterator[list[str]]:
    """TRL's warnings of changed prompts inside the block, kept from the log; those of other processes stay in it."""
    found: list[str] = []
    process, logger = os.getpid(), logging.getLogger(TRL_LOGGER)

    def keep(record: logging.LogRecord) -> bool:
        if TRL_WORDS not in record.getMessage() or os.getpid() != process:
            return True
        found.append(record.getMessage())
        return False

    logger.addFilter(keep)
    # accelerate says a thing once a process (1.15): a second data set of the same kind would go untold
    adapter: Any = sft_trainer.logger
    adapter.warning_once = lru_cache(None)(adapter.warning)
    try:
        yield found
    finally:
        del adapter.warning_once
        logger.removeFilter(keep)


def changed_prompts(tokens: Dataset, renderer: Renderer) -> list[Finding]:
    """The finding, with its rows; only asked where TRL saw one, for each prompt is tokenised once more."""
    if not {"prompt", "completion"} <= set(tokens.column_names):
        return []
    rows: Any = tokens
    changed = [row[ROW] for row in rows if not _is_beginning(prompt_ids(row, renderer), row["input_ids"])]
    return finding(
        "prompt_changed", "warning", sorted(changed), len(tokens),
        "have a prompt whose end is left out: it is other tokens alone than before the completion, so the model is asked "
        "otherwise than it was trained",
        "end the prompt before a white space, give the row an answer, or use a chat template that renders the prompt alike in both",
    )  # fmt: skip


def prompt_ids(row: dict[str, Any], renderer: Renderer) -> list[int]:
    """The prompt alone, as TRL tokenises it."""
    if isinstance(row["prompt"], list):
        options = renderer.options(row)
        return _tokenize(renderer.tokenizer, row["prompt"], add_generation_prompt=True, **options)["input_ids"]
    return _tokenize(renderer.tokenizer, row["prompt"], chat_template=renderer.chat_template)["input_ids"]


def _is_beginning(part: list[int], whole: list[int]) -> bool:
    return list(whole[: len(part)]) == list(part)
