"""The tokens and masks of training, every row whole and in order, without the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.core.errors import ConfigError
from qtarget.data.checks.findings import Finding
from qtarget.data.limits import Limits
from qtarget.data.limits.templates import bounded_templates
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.data.columns import ROW
from qtarget.integrations.sft.data.weight_findings import weight_findings
from qtarget.integrations.sft.preparation import changed
from qtarget.integrations.sft.rendering.renderer import Renderer
from qtarget.integrations.sft.rendering.rows import TokenRow, render
from qtarget.integrations.sft.rendering.shape import adopt
from qtarget.integrations.sft.rendering.token_rows import MASKS


@dataclass(frozen=True)
class TokenisedRows:
    """Rows as TRL tokenises them, before it cuts and drops any.

    Attributes:
        rows: ``input_ids`` and ``labels`` ``[length]`` int64 each; row i is row i of the data. None where TRL stops.
        tokenizer: as training uses it (``eos_token``, ``chat_template_path`` applied).
        chat_template: TRL's training template where it replaces the tokenizer's own, else None.
        findings: of the rendered rows; training stops at errors.
    """

    rows: list[TokenRow] | None
    tokenizer: Any
    chat_template: str | None
    findings: list[Finding] = field(default_factory=list)


def tokenise(args: QTargetConfig, dataset: Dataset, tokenizer: Any) -> TokenisedRows:
    """Tokenise as ``qtarget train`` and ``qtarget score`` do, through TRL's own preparation.

    TRL's trainer wants a model and prepares nothing that depends on its weights, so it gets a stand-in of a few rows.
    Rows without a single assistant token, at which TRL stops under ``assistant_only_loss``, are kept with all labels
    ignored.

    Raises:
        ConfigError: settings that TRL refuses (``assistant_only_loss`` for rows that are no conversations).
        DataError: columns that contradict the rows' shape, or a chat template that takes too long.
    """
    # Trainer makes its output_dir as it is built (transformers 5.23), and nothing is trained here
    with TemporaryDirectory() as nowhere, bounded_templates(Limits.of(args.limits).template_seconds):
        return _tokenise(changed(args, output_dir=nowhere), dataset, tokenizer)


def _tokenise(args: QTargetConfig, dataset: Dataset, tokenizer: Any) -> TokenisedRows:
    rows, left_out = adopt(dataset, "train", text_field=args.dataset_text_field)
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
        # TRL 1.16 refuses masks without labels where it is told to prepare nothing; here it prepares below, as in training
        masks = [] if "labels" in rows.column_names else [c for c in MASKS if c in rows.column_names]
        trainer = SFTTrainer(stand_in, whole, train_dataset=rows.remove_columns(masks), processing_class=tokenizer)
    except ValueError as error:
        raise ConfigError(f"TRL refuses these rows with this configuration, and so would training: {error}") from error
    prepared: Any = trainer.processing_class
    template = trainer.chat_template
    renderer = Renderer(
        prepared, template, args.dataset_text_field, args.assistant_only_loss, trainer.completion_only_loss
    )
    rendered = render(rows, "train", trl=trainer._prepare_dataset, args=whole, renderer=renderer)
    weighed = weight_findings(rows, rendered.tokens, prepared, template, args)
    found = dict(rendered.silent)
    if rendered.tokens is not None:
        found |= dict(_arrays(rendered.tokens))
    complete = len(found) == len(rows)
    tokens = [found[i] for i in range(len(rows))] if complete else None
    return TokenisedRows(tokens, prepared, template, [*left_out, *rendered.findings, *weighed])


def cut(row: TokenRow, args: QTargetConfig) -> TokenRow:
    """What training keeps of a row: TRL's truncation to ``max_length``."""
    if args.max_length is None:
        return row
    kept = slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
    return {name: values[kept] for name, values in row.items()}


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
