"""The operations on a whole chunk of logits: sum over it, exponentiate it, overwrite it with its gradient.

Written in tiles that fit a core's cache, so that the logits cross the memory bus a time or two, whatever the target.
``triton`` holds what GPUs need of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from qtarget.core.errors import HyperparameterError
from qtarget.core.shapes import Float, Tensor
from qtarget.loss.columns import RestGradient, RestSums

NOTHING = -1e30
"""Maximum of an empty set of logits: finite, so that ``-inf - NOTHING`` is not NaN."""

TILE_BYTES = {"cpu": 2**22}
"""Working size; on a GPU, where launches cost more than the cache saves, 64 MiB."""

RUN_BYTES = 2**20
"""Logits whose running maximum ``maxima`` keeps in the cache."""

GROUP = 64
"""Columns whose maximum stands for them in the first step of ``largest``."""


def tiles(logits: Float[Tensor, "tokens vocab"]) -> Iterator[tuple[slice, slice, Tensor]]:
    """Contiguous pieces, front to back: their tokens and columns, and room for float32 or float64 work on each.

    The room is shaped and laid out like the piece. Work there and not on bfloat16: an operation on two dtypes is ten
    times slower on a CPU.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    stored = logits.T if token_is_fast(logits) else logits
    size = max(1, TILE_BYTES.get(logits.device.type, 2**26) // (4 * max(stored.shape[1], 1)))
    room = torch.empty(min(size, len(stored)), stored.shape[1], dtype=wide, device=logits.device)
    for start in range(0, len(stored), size):
        piece = slice(start, min(start + size, len(stored)))
        part = room[: piece.stop - piece.start]
        yield (piece, slice(None), part) if stored is logits else (slice(None), piece, part.T)


def token_is_fast(logits: Float[Tensor, "tokens vocab"]) -> bool:
    """Whether the logits are stored ``[vocab, tokens]``."""
    return logits.stride(0) == 1 and logits.shape[0] > 1


def minus(tile: Float[Tensor, "tokens vocab"], shift: Float[Tensor, " tokens"], room: Tensor) -> Tensor:
    """``tile - shift``, in the room."""
    if tile.dtype == room.dtype:
        return torch.sub(tile, shift[:, None], out=room)
    return room.copy_(tile).sub_(shift[:, None])


def rest_sums(logits: Float[Tensor, "tokens vocab"], *, entropy: bool) -> RestSums:
    """Sums over each token's logits; columns set aside hold minus infinity."""
    return exponentiate(logits, None, entropy=entropy)[1]


def exponentiate(
    logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype | None, *, entropy: bool, maximum: Tensor | None = None
) -> tuple[Float[Tensor, "tokens vocab"], RestSums]:
    """``exp(z - maximum)`` in place of the logits, and the sums over it; where a column was set aside it is zero.

    Args:
        logits: overwritten.
        dtype: of the exponentials: the logits', or a narrower one, which takes the front of the same memory; with None
            nothing is written.
        entropy: whether to sum ``exp(x) x`` as well.
        maximum: ``[tokens]`` to subtract instead of each token's largest logit.
    """
    if maximum is None:
        maximum = maxima(logits).to(torch.promote_types(logits.dtype, torch.float32)).clamp_(min=NOTHING)
    exp, exp_x = torch.zeros_like(maximum), torch.zeros_like(maximum) if entropy else None
    out = logits if dtype is None else narrowed(logits, dtype)
    for rows, columns, room in tiles(logits):
        tile = logits[rows, columns]
        place = tile if dtype == tile.dtype == room.dtype else room  # at once where they stay, if they are not narrowed
        x = minus(tile, maximum[rows], place if exp_x is None else room)
        # the entropy still needs ``x``, which lies in the room
        e = torch.exp(x, out=place) if exp_x is None or place is tile else x.exp()
        exp[rows] += e.sum(-1)
        if exp_x is not None:
            # a column set aside has e = 0 and x = -inf, whose product is NaN
            exp_x[rows] += x.clamp_(min=NOTHING).mul_(e).sum(-1)
        if dtype is not None and place is room:
            out[rows, columns] = e  # behind the logits that are still to be read, whatever the dtype
    return out, RestSums(maximum, exp, exp_x)


def maxima(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """Each token's largest logit.

    Where tokens are fast, element by element over long runs: ``amax`` takes several times as long there.
    """
    if not token_is_fast(logits):
        return logits.amax(-1)
    run = max(1, RUN_BYTES // (logits.itemsize * len(logits)))
    return running_maximum(logits.T.split(run)).amax(0)


def running_maximum(parts: Sequence[Tensor]) -> Tensor:
    """Element by element over parts of one shape; the last may have fewer rows."""
    best = parts[0].clone()
    for part in parts[1:]:
        torch.maximum(best[: len(part)], part, out=best[: len(part)])
    return best


def narrowed(logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype) -> Float[Tensor, "tokens vocab"]:
    """The front of the logits' memory as a tensor of ``dtype``, laid out as they are."""
    if dtype == logits.dtype:
        return logits
    stored = logits.T if token_is_fast(logits) else logits
    front = stored.view(-1).view(dtype)[: stored.numel()].view(stored.shape)
    return front.T if stored is not logits else front


def overwrite_with_gradient(
    logits: Float[Tensor, "tokens vocab"], gradient: RestGradient, softcap: float | None = None
) -> None:
    """Replace the logits of the rest by their gradient, in place; what columns set aside end up with is arbitrary.

    With a soft-cap it is the gradient by what the cap was applied to.
    """
    for rows, columns, room in tiles(logits):
        tile = logits[rows, columns]
        x = minus(tile, gradient.shift[rows], room)
        factor = gradient.factor[rows, None]
        # the logit again, because ``x`` is relative to the shift
        chain = None if softcap is None else 1 - ((x + gradient.shift[rows, None]) / softcap).square_()
        if gradient.slope is None:
            x.exp_().mul_(factor)
        else:
            line = x.clamp(min=NOTHING).mul_(gradient.slope[rows, None]).add_(factor)
            x.exp_().mul_(line)
        if gradient.level is not None:
            x.add_(gradient.level[rows, None])
        if chain is not None:
            x.mul_(chain)
        tile.copy_(x)


def scale_exponentials(
    exponentials: Float[Tensor, "tokens vocab"], factor: Float[Tensor, " tokens"], slope: Float[Tensor, " tokens"]
) -> None:
    """``e (factor + slope log e)`` in place of each ``e``: the gradient of an entropy."""
    for rows, columns, room in tiles(exponentials):
        e = room.copy_(exponentials[rows, columns])
        # exponentials that underflowed are 0, and 0 times their logarithm must be 0
        line = e.log().clamp_(min=NOTHING).mul_(slope[rows, None]).add_(factor[rows, None])
        exponentials[rows, columns] = e.mul_(line)


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
    # then k groups hold a quarter of the vocabulary or more: nothing is saved
    if groups <= 4 * k:
        return logits.topk(k, dim=-1).values
    peaks = running_maximum(logits[:, : groups * GROUP].split(groups, dim=1))
    best = peaks.topk(k, dim=-1).indices
    columns = (best[:, :, None] + groups * torch.arange(GROUP, device=logits.device)).flatten(1)
    # columns after the last whole group belong to none
    found = torch.cat([logits.gather(-1, columns), logits[:, groups * GROUP :]], dim=-1)
    return found.topk(k, dim=-1).values
