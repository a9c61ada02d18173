"""The one place that divides, and sums over sequences."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

from qtarget.core.errors import HyperparameterError, ShapeError
from qtarget.core.shapes import Float, Int, Tensor

Reduction = Literal["mean", "sum", "none"]


def denominator(token_count: int, num_items: int | Tensor | None, reduction: Reduction) -> float | Tensor:
    """What the summed loss is divided by.

    Args:
        token_count: supervised tokens in this call.
        num_items: supervised tokens of the whole optimizer batch, over all micro-batches and ranks. Give it whenever
            the batch is split, or micro-batches with few tokens weigh too much. As a tensor it is never read on the host,
            and 0 counts as 1: a batch without a supervised token has loss 0.
        reduction: ``mean`` divides, ``sum`` does not.

    Raises:
        HyperparameterError: unknown reduction, ``num_items`` given with ``sum``, not positive, or not one number.
    """
    if reduction not in get_args(Reduction):
        raise HyperparameterError(f"reduction {reduction!r} is unknown; expected {', '.join(get_args(Reduction))}")
    if reduction != "mean":
        if num_items is not None:
            raise HyperparameterError(f"num_items divides a mean; with reduction={reduction!r} leave it out")
        return 1.0
    if num_items is None:
        # a call without a supervised token has loss 0, not 0 / 0
        return float(max(token_count, 1))
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise HyperparameterError(
                f"num_items has shape {tuple(num_items.shape)}; expected one number, the sum over ranks"
            )
        num_items = num_items.reshape(())
        return num_items.clamp(min=1)  # a batch without a supervised token: its sum is zero, and so is its mean
    if num_items <= 0:
        raise HyperparameterError(f"num_items={num_items}; expected the positive number of supervised tokens")
    return float(num_items)


def sequence_means(
    values: Float[Tensor, " tokens"], sequence_ids: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " sequences"], Int[Tensor, " tokens"]]:
    """Mean of ``values`` in each sequence, and for each token the index of its sequence's mean.

    Raises:
        ShapeError: one id for each value is expected.
    """
    if values.shape != sequence_ids.shape:
        raise ShapeError(f"{tuple(values.shape)} values but {tuple(sequence_ids.shape)} sequence ids")
    # ids are names: they need not be 0, 1, 2, ...
    _, index = torch.unique(sequence_ids, return_inverse=True)
    size = int(index.max()) + 1 if index.numel() else 0
    total = torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, index, values)
    count = torch.zeros_like(total).index_add(0, index, torch.ones_like(values))
    return total / count, index


def keep_top(scores: Float[Tensor, " tokens"], fraction: float) -> Float[Tensor, " tokens"]:
    """1 for the highest ``ceil(fraction * tokens)`` scores (of equal ones the first), else 0."""
    kept = math.ceil(round(fraction * scores.numel(), 6))  # 0.28 x 25 is 7.000000000000001
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(scores).index_fill(0, order[:kept], 1.0)
