"""Batches: TRL's collator, plus the per-token columns of each row and what a cache holds of its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from qtarget.core.errors import CacheMismatchError
from qtarget.core.shapes import Tensor
from qtarget.core.types import Target
from qtarget.integrations.sft.data.columns import DATA_COLUMNS, ROW_IDS
from qtarget.integrations.shared.step import REFERENCE_FIELDS
from qtarget.scoring.cache.reader import ReferenceCache


@dataclass
class TargetCollator(DataCollatorForLanguageModeling):
    """TRL's collator, plus the per-token columns and the cached numbers of each label.

    Added keys, unshifted like the labels: ``row_ids`` (-1 at padding), ``loss_weights``, and for each role with a cache
    ``{role}_label_log_probs`` and the other fields of ``Reference``. With ``zero_masks`` labels of weight 0 become -100, so
    that everything that counts labels leaves them out. Padding-free batches get ``example_ids``.
    """

    caches: dict[str, ReferenceCache] = field(default_factory=dict)
    with_topk: dict[str, bool] = field(default_factory=dict)
    zero_masks: bool = True

    @classmethod
    def instead_of(
        cls, theirs: Any, caches: dict[str, ReferenceCache], target: Target, zero_masks: bool = True
    ) -> TargetCollator:
        """One that pads as TRL's does, with the columns that the target reads."""
        return cls(
            pad_token_id=theirs.pad_token_id,
            padding_free=theirs.padding_free,
            return_position_ids=theirs.return_position_ids,
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            caches=caches,
            with_topk={role: "distribution" in getattr(target.needs, role) for role in caches},
            zero_masks=zero_masks,
        )

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        shape = batch["labels"].shape
        batch["row_ids"] = self._column(examples, ROW_IDS, shape, -1)
        if self.padding_free:
            numbered = [
                {**example, "example_ids": [i] * len(example["input_ids"])} for i, example in enumerate(examples)
            ]
            batch["example_ids"] = self._column(numbered, "example_ids", shape, -1)
        if "loss_weights" in examples[0]:
            batch["loss_weights"] = self._column(examples, "loss_weights", shape, 1.0)
        for name in DATA_COLUMNS:
            if name in examples[0]:
                batch[name] = self._column(examples, name, shape, 0.0)
        for role, cache in self.caches.items():
            segments = list(self._segments(examples, f"{role}_rows"))
            batch |= cached_columns(cache, segments, batch["labels"], role, self.with_topk[role])
        if self.zero_masks and "loss_weights" in batch:  # only now: caches hold numbers of these tokens too
            batch["labels"] = batch["labels"].masked_fill(batch["loss_weights"] == 0, -100)
        return batch

    def of_documents(self, documents: list[list[int]]) -> dict[str, Any]:
        """What the model gets of documents packed into one row."""
        ids = [token for document in documents for token in document]
        row = {"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in documents]}
        batch = super().torch_call([row])
        del batch["labels"]
        return batch

    def _column(self, examples: list[dict[str, Any]], name: str, shape: Sequence[int], fill: float) -> Tensor:
        out = torch.full(tuple(shape), fill, dtype=torch.long if name.endswith("_ids") else torch.float32)
        for b, start, example in self._placed(examples):
            values = torch.as_tensor(example[name])
            out[b, start : start + len(values)] = values
        return out

    def _placed(self, examples: list[dict[str, Any]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Batch row and first column of each example: its own row, or all in row 0 when padding-free."""
        start = 0
        for b, example in enumerate(examples):
            yield (0, start, example) if self.padding_free else (b, 0, example)
            start += len(example["input_ids"])

    def _segments(self, examples: list[dict[str, Any]], column: str) -> Iterator[tuple[int, int, int, int]]:
        """Batch row, first column, length and cache row of each data row, also inside packed examples."""
        for b, start, example in self._placed(examples):
            lengths = example.get("seq_lengths") or [len(example["input_ids"])]
            offset = 0
            for length in lengths:
                yield b, start + offset, length, example[column][offset]
                offset += length


def cached_columns(
    cache: ReferenceCache, segments: list[tuple[int, int, int, int]], labels: Tensor, role: str, with_topk: bool
) -> dict[str, Tensor]:
    """Spread the cached numbers of each data row over its supervised tokens.

    Rows of draws differ in width: unused slots hold the id -1.
    """
    found: dict[str, list[tuple[int, Tensor, Any]]] = {}
    for b, start, length, index in segments:
        places = (labels[b, start : start + length] != -100).nonzero()[:, 0]
        places = places[places > 0] + start  # the first token of a row is predicted by nothing
        row = cache.row(index)
        for name in REFERENCE_FIELDS:
            values = row.get(name)
            if values is None or (name.startswith(("topk", "tail")) and not with_topk):
                continue
            if len(values) != len(places):
                raise CacheMismatchError(
                    f"{role} cache row {index} holds {len(values)} tokens, the batch has {len(places)} supervised ones there; "
                    "score again with this configuration (`qtarget score CONFIG.yaml`)"
                )
            found.setdefault(name, []).append((b, places, values))
    return {f"{role}_{name}": spread_rows(name, parts, labels.shape) for name, parts in found.items()}


def spread_rows(name: str, parts: list[tuple[int, Tensor, Any]], shape: Sequence[int]) -> Tensor:
    """One tensor ``[batch, time]`` or ``[batch, time, slots]`` of batch rows, places and values."""
    dtype = torch.long if name == "topk_ids" else torch.float32
    slots = max((values.shape[1] for _, _, values in parts if values.ndim == 2), default=None)
    if slots is None:
        out = torch.zeros(*shape, dtype=dtype)
        for b, places, values in parts:
            out[b, places] = torch.as_tensor(values).to(dtype)
        return out
    out = torch.full((*shape, slots), -1 if name == "topk_ids" else -torch.inf, dtype=dtype)
    for b, places, values in parts:
        out[b, places, : values.shape[1]] = torch.as_tensor(values).to(dtype)
    return out
