"""The tokens and masks of training, every row whole and in order, without the model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.data_utils import _tokenize, is_conversational
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.core.errors import ConfigError
from qtarget.data.checks.audit import IGNORE_INDEX
from qtarget.integrations.sft.columns import with_row_ids
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.preparation import changed
from qtarget.integrations.sft.weights import ROW

TokenRow = dict[str, np.ndarray]


@dataclass(frozen=True)
class TokenisedRows:
    """Rows as TRL tokenises them, before it cuts and drops any.

    Attributes:
        rows: ``input_ids`` and ``labels`` ``[length]`` int64 each; row i is row i of the data.
        tokenizer: as training uses it (``eos_token``, ``chat_template_path`` applied).
        chat_template: TRL's training template where it replaces the tokenizer's own, else None.
    """

    rows: list[TokenRow]
    tokenizer: Any
    chat_template: str | None


def tokenise(args: QTargetConfig, dataset: Dataset, tokenizer: Any) -> TokenisedRows:
    """Tokenise as ``qtarget train`` and ``qtarget score`` do, through TRL's own preparation.

    TRL's trainer wants a model and prepares nothing that depends on its weights, so it gets a stand-in of a few rows.
    Rows without a single assistant token, at which TRL stops under ``assistant_only_loss``, are kept with all labels
    ignored.

    Raises:
        ConfigError: settings that TRL refuses (``assistant_only_loss`` for rows that are no conversations).
    """
    whole = changed(
        args, max_length=None, shuffle_dataset=False, packing=False, eval_packing=False, padding_free=False,
        report_to=[], eval_strategy="no", dataset_kwargs={"skip_prepare_dataset": True}, model_init_kwargs=None,
    )  # fmt: skip
    stand_in = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    try:
        trainer = SFTTrainer(stand_in, whole, train_dataset=dataset, processing_class=tokenizer)
    except ValueError as error:
        raise ConfigError(f"TRL refuses these rows with this configuration, and so would training: {error}") from error
    prepared: Any = trainer.processing_class
    template = trainer.chat_template
    numbered = with_row_ids(dataset)
    masked = _without_assistant(numbered, prepared, template) if args.assistant_only_loss else {}
    usable = numbered.select([i for i in range(len(numbered)) if i not in masked]) if masked else numbered
    rows: dict[int, TokenRow] = dict(masked)
    if len(usable):
        tokens: Any = trainer._prepare_dataset(usable, prepared, whole, False, None, "train")
        rows |= dict(_arrays(tokens))
    return TokenisedRows([rows[i] for i in range(len(numbered))], prepared, template)


def cut(row: TokenRow, args: QTargetConfig) -> TokenRow:
    """What training keeps of a row: TRL's truncation to ``max_length``."""
    if args.max_length is None:
        return row
    kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
    return {name: values[kept] for name, values in row.items()}


def _without_assistant(dataset: Dataset, tokenizer: Any, template: str | None) -> dict[int, TokenRow]:
    """Conversations whose assistant mask is all zero, by row number; TRL's own call, row by row."""
    found: dict[int, TokenRow] = {}
    if "input_ids" in dataset.column_names:
        return found
    rows: Any = dataset
    for row in rows:
        if not is_conversational(row):
            continue
        messages = row["prompt"] + row["completion"] if row.get("prompt") is not None else row["messages"]
        tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        keywords = {"chat_template": template, "tools": tools, **(row.get("chat_template_kwargs") or {})}
        processed = _tokenize(tokenizer, messages, return_assistant_tokens_mask=True, **keywords)
        if 1 not in processed["assistant_masks"]:
            ids = np.asarray(processed["input_ids"], dtype=np.int64)
            found[row[ROW]] = {"input_ids": ids, "labels": np.full_like(ids, IGNORE_INDEX)}
    return found


def _arrays(dataset: Dataset) -> Iterator[tuple[int, TokenRow]]:
    """Row number and arrays, read from Arrow without a Python object a token."""
    columns: Any = dataset.select_columns([ROW, "input_ids", "labels"]).with_format("arrow")
    for table in columns.iter(batch_size=1000):
        parts = {}
        for name in ("input_ids", "labels"):
            lists = table[name].combine_chunks()
            flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
            parts[name] = np.split(flat, np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))[:-1])
        for i, number in enumerate(table[ROW].to_pylist()):
            yield number, {name: values[i] for name, values in parts.items()}
