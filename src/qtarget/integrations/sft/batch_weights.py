"""Label weights of batch-scope targets: they depend on all tokens of an optimizer batch, over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qtarget.api import label_weights
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead, Reference, Target
from qtarget.integrations.shared.step import TargetStep, shifted
from qtarget.loss.chunked import frozen_label_statistics
from qtarget.registry import get_target

Statistics = tuple[Tensor, Tensor, Tensor]
"""Live and reference label log-probs and row ids of the supervised tokens of one micro-batch, ``[tokens]`` each."""


@torch.no_grad()
def attach_label_weights(
    target: Target, batches: list[dict[str, Any]], statistics: Callable[[dict[str, Any]], Statistics], accelerator: Any
) -> None:
    """Put ``label_weights`` into each micro-batch of one optimizer batch.

    Args:
        statistics: of one micro-batch, by a forward pass without gradient.
    """
    runs = [statistics(dict(batch)) for batch in batches]
    union = [torch.cat([run[i] for run in runs]) for i in range(3)]
    log_probs, reference, ids = (_gather_ragged(accelerator, value) for value in union)
    weights = label_weights(target, log_probs, reference=Reference(label_log_probs=reference), sequence_ids=ids)
    start = _count_before(accelerator, len(union[0]))
    for batch, run in zip(batches, runs, strict=True):
        mask = batch["labels"].clone()
        mask[:, 0] = -100
        mask = mask != -100
        full = torch.zeros(mask.shape, dtype=torch.float32)
        full[mask.cpu()] = weights[start : start + len(run[0])].float().cpu()
        batch["label_weights"] = full.to(batch["labels"].device)
        start += len(run[0])


def statistics_of_step(model: Any, model_inputs: dict[str, Any], step: TargetStep) -> Statistics:
    """What ``attach_label_weights`` asks of one micro-batch; the step's target is left out, its frozen numbers are used."""
    frozen = step.frozen.get("reference")
    step.target, step.backend = get_target("sft"), "auto"
    output = model(**model_inputs, target_loss=step)
    mask = step.labels[:, 1:] != -100
    live = output.label_log_probs[mask]
    reference = torch.zeros_like(live)  # for rules that look at the live model alone
    moved = shifted(frozen)
    if moved is not None:
        kept = moved.flatten(tuple(mask.shape)).rows(mask.reshape(-1).nonzero()[:, 0])
        known = frozen_label_statistics(kept, step.labels[:, 1:][mask]) if isinstance(kept, FrozenHead) else kept
        assert known.label_log_probs is not None
        reference = known.label_log_probs
    assert step.sequence_ids is not None
    return live, reference.to(live), step.sequence_ids[:, 1:][mask]


def _gather_ragged(accelerator: Any, values: Tensor) -> Tensor:
    """Concatenate one-dimensional tensors of different lengths over all ranks, in rank order."""
    if accelerator.num_processes == 1:
        return values
    lengths = accelerator.gather(torch.tensor([len(values)], device=values.device))
    padded = torch.zeros(int(lengths.max()), dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    rows = accelerator.gather(padded[None])
    return torch.cat([row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)])


def _count_before(accelerator: Any, count: int) -> int:
    """How many tokens the ranks before this one hold."""
    if accelerator.num_processes == 1:
        return 0
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts[: accelerator.process_index].sum())
