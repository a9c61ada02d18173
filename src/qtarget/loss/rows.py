"""The two operations on a whole chunk of logits: sum over it, and overwrite it with its gradient.

Written in tiles that fit a core's cache, so that the logits cross the memory bus once for the sums and once for the
gradient, whatever the target. ``triton_rows`` holds the same two operations for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qtarget.errors import HyperparameterError
from qtarget.loss.columns import RestGradient, RestSums
from qtarget.shapes import Float, Tensor

BY_VOCABULARY = True
"""These operations take logits stored ``[vocab, tokens]`` as well (see ``head.HeadProducts``)."""

NOTHING = -1e30
"""Maximum of an empty set of logits: finite, so that ``-inf - NOTHING`` is not NaN."""

TILE_BYTES = {"cpu": 2**20}
"""Working size; on a GPU, where launches cost more than the cache saves, 64 MiB."""

GROUP = 64
"""Columns whose maximum stands for them in the first step of ``largest``."""


def tiles(logits: Float[Tensor, "tokens vocab"]) -> Iterator[tuple[slice, Tensor]]:
    """Contiguous pieces of the logits with the tokens they belong to, split along the slow dimension."""
    size = TILE_BYTES.get(logits.device.type, 2**26) // 4
    count, vocab = logits.shape
    if logits.stride(0) == 1 and count > 1:  # token is the fast dimension
        for tile in logits.split(max(1, size // count), dim=1):
            yield slice(None), tile
    else:
        for start in range(0, count, step := max(1, size // vocab)):
            rows = slice(start, start + step)
            yield rows, logits[rows]


def rest_sums(logits: Float[Tensor, "tokens vocab"], *, entropy: bool) -> RestSums:
    """Sums over each token's logits; columns set aside hold minus infinity. One read, online softmax."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    zeros = torch.zeros(len(logits), dtype=wide, device=logits.device)
    maximum, exp, exp_x = torch.full_like(zeros, NOTHING), zeros.clone(), zeros.clone()
    for rows, tile in tiles(logits):
        old = maximum[rows]
        new = torch.maximum(old, tile.amax(-1).to(wide))
        x = tile - new[:, None]
        moved = old - new
        shrink = moved.exp()
        if entropy:
            e = x.exp()
            product = torch.mul(e, x.clamp_(min=NOTHING), out=x)
            exp_x[rows] = shrink * (exp_x[rows] + moved * exp[rows]) + product.sum(-1)
        else:
            e = x.exp_()
        exp[rows] = shrink * exp[rows] + e.sum(-1)
        maximum[rows] = new
    return RestSums(maximum, exp, exp_x if entropy else None)


def overwrite_with_gradient(
    logits: Float[Tensor, "tokens vocab"], gradient: RestGradient, softcap: float | None = None
) -> None:
    """Replace the logits of the rest by their gradient, in place; what columns set aside end up with is arbitrary.

    With a soft-cap it is the gradient by what the cap was applied to.
    """
    for rows, tile in tiles(logits):
        shift, factor = gradient.shift[rows, None], gradient.factor[rows, None]
        chain = None if softcap is None else 1 - (tile.to(shift.dtype) / softcap).square_()
        x = tile.sub_(shift) if tile.dtype == shift.dtype else tile - shift
        if gradient.slope is None:
            x.exp_().mul_(factor)
        else:
            line = x.clamp(min=NOTHING).mul_(gradient.slope[rows, None]).add_(factor)
            x.exp_().mul_(line)
        if gradient.level is not None:
            x.add_(gradient.level[rows, None])
        if chain is not None:
            x.mul_(chain)
        if x is not tile:
            tile.copy_(x)


def check_top_k(k: int, vocab: int) -> None:
    """Raise unless the vocabulary has k entries.

    Raises:
        HyperparameterError: k exceeds the vocabulary.
    """
    if k > vocab:
        raise HyperparameterError(f"top_k={k} exceeds the vocabulary of {vocab}; choose a smaller top_k")


def largest(logits: Float[Tensor, "tokens vocab"], k: int) -> Float[Tensor, "tokens k"]:
    """The k largest logits, descending: only the k groups of columns with the largest maxima can hold them.

    A group is every ``V / GROUP``-th column, so that the maxima are taken element by element over long runs.
    """
    vocab = logits.shape[1]
    groups = vocab // GROUP
    if groups <= 4 * k:
        return logits.topk(k, dim=-1).values
    maxima = logits[:, :groups].clone()
    for member in logits[:, groups : groups * GROUP].split(groups, dim=1):
        torch.maximum(maxima, member, out=maxima)
    best = maxima.topk(k, dim=-1).indices
    columns = (best[:, :, None] + groups * torch.arange(GROUP, device=logits.device)).flatten(1)
    found = torch.cat([logits.gather(-1, columns), logits[:, groups * GROUP :]], dim=-1)
    return found.topk(k, dim=-1).values
