"""Outcomes shared by the live and a frozen model: the whole vocabulary, or k listed tokens and one tail.

Which of the two depends on what is known of the frozen model and on its tail policy; formulas need not care.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qtarget.core.errors import ShapeError
from qtarget.core.shapes import Bool, Float, Int, Tensor
from qtarget.core.types import NO_TAIL, FrozenHead, Outcomes, Reference

ABSENT = -1e30
"""Log-prob of an outcome that does not exist: finite, so that absent minus absent is 0 and not NaN."""


def listed_once(ids: Int[Tensor, "tokens k"]) -> Bool[Tensor, "tokens k"]:
    """Which slots name a token that no earlier slot of the row names (``-1`` marks an unused slot)."""
    order = ids.argsort(dim=-1, stable=True)
    ascending = ids.gather(-1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    return torch.zeros_like(repeated).scatter(-1, order, ~repeated) & (ids >= 0)


def outside(
    log_probs: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens k"], listed: Bool[Tensor, "tokens k"]
) -> Float[Tensor, "tokens vocab"]:
    """The log-probs with those at the listed ids set to minus infinity."""
    vocab = log_probs.shape[-1]
    hit = torch.zeros(len(log_probs), vocab + 1, dtype=torch.bool, device=log_probs.device)
    hit.scatter_(-1, torch.where(listed, ids, vocab), True)  # unlisted slots hit a last column that is cut off
    return log_probs.masked_fill(hit[:, :vocab], -torch.inf)


def tail_log_mass(
    log_probs: Float[Tensor, "tokens vocab"],
    ids: Int[Tensor, "tokens k"],
    listed: Bool[Tensor, "tokens k"],
) -> Float[Tensor, " tokens"]:
    """Log of the probability outside ``ids``, summed over the rest and never as ``1 - sum``: nothing cancels."""
    rest = outside(log_probs, ids, listed)
    empty = (rest == -torch.inf).all(-1)
    # logsumexp of nothing has a NaN gradient, which masking its value afterwards would not remove
    mass = torch.where(empty[:, None], 0.0, rest).logsumexp(-1)
    return mass.masked_fill(empty, ABSENT)


def frozen_outcomes(frozen: Reference, listed: Bool[Tensor, "tokens k"], like: Tensor) -> Float[Tensor, "tokens k_1"]:
    """Frozen log-probs of the k listed tokens and, last, of everything else, under the reference's tail policy."""
    assert frozen.topk_log_probs is not None
    kept = frozen.topk_log_probs.to(like.dtype).masked_fill(~listed, ABSENT)
    if frozen.tail_policy in NO_TAIL:
        tail = torch.full_like(kept[:, :1], ABSENT)
        return torch.cat([kept - kept.logsumexp(-1, keepdim=True), tail], dim=-1)
    assert frozen.tail_log_mass is not None
    tail = frozen.tail_log_mass.to(like.dtype)[:, None]
    joined = torch.cat([kept, tail], dim=-1)
    # storage rounded the numbers: they sum to one only nearly
    return joined - joined.logsumexp(-1, keepdim=True)


def spread_log_probs(
    frozen: Reference, listed: Bool[Tensor, "tokens k"], like: Tensor
) -> Float[Tensor, "tokens vocab"]:
    """A full distribution with the tail mass uniform over the tokens that are not listed."""
    assert frozen.topk_ids is not None
    bucket = frozen_outcomes(replace(frozen, tail_policy="bucket"), listed, like)
    unlisted = like.shape[-1] - listed.sum(-1)
    level = bucket[:, -1] - unlisted.clamp(min=1).to(like.dtype).log()
    full = level[:, None].expand_as(like).contiguous()
    trash = torch.cat([full, full[:, :1]], dim=-1)  # unused slots write into a last column that is cut off
    column = torch.where(listed, frozen.topk_ids, like.shape[-1])
    return trash.scatter(-1, column, bucket[:, :-1])[:, :-1]


@dataclass(frozen=True)
class Alignment:
    """Where the outcomes shared with a frozen model lie: everywhere (``ids`` absent), or at k ids and a tail."""

    frozen: Tensor
    ids: Tensor | None = None
    listed: Tensor | None = None


def align(frozen: Reference, like: Float[Tensor, "tokens vocab"]) -> Alignment:
    """Choose the outcomes on which live and frozen model are compared."""
    if frozen.log_probs is not None:
        return Alignment(frozen.log_probs.to(like.dtype))
    assert frozen.topk_ids is not None
    listed = listed_once(frozen.topk_ids)
    if frozen.tail_policy == "spread":
        return Alignment(spread_log_probs(frozen, listed, like))
    return Alignment(frozen_outcomes(frozen, listed, like), frozen.topk_ids.clamp(min=0), listed)


def shared_outcomes(log_probs: Float[Tensor, "tokens vocab"], at: Alignment) -> Outcomes:
    """Live log-probs on the aligned outcomes."""
    if at.ids is None or at.listed is None:
        return Outcomes(log_probs, at.frozen)
    listed = log_probs.gather(-1, at.ids).masked_fill(~at.listed, ABSENT)
    tail = tail_log_mass(log_probs, at.ids, at.listed)
    return Outcomes(torch.cat([listed, tail[:, None]], dim=-1), at.frozen)


def check_outcomes(frozen: Reference | FrozenHead | None, vocab: int) -> None:
    """Raise when a frozen distribution cannot be one over the live vocabulary (call it on supervised tokens only).

    Raises:
        ShapeError: vocabularies differ, an id lies outside the live one, or the listed mass and the tail do not sum
            to one within 2 %.
    """
    if isinstance(frozen, FrozenHead) or (frozen is not None and frozen.log_probs is not None):
        size = frozen.lm_head_weight.shape[0] if isinstance(frozen, FrozenHead) else frozen.log_probs.shape[-1]  # pyright: ignore[reportOptionalMemberAccess]
        if size != vocab:
            raise ShapeError(
                f"the frozen model has {size} vocabulary entries, the live model {vocab}; compare the tokenizers, and "
                "cut padding rows of the larger head before calling"
            )
        return
    if frozen is None or frozen.topk_ids is None or frozen.topk_log_probs is None or not frozen.topk_ids.numel():
        return
    empty = (frozen.topk_ids < 0).all(-1)
    if bool(empty.any()) and not bool(empty.all()):  # all: a tail of mass one is a distribution too
        raise ShapeError(
            f"the reference lists no token at {int(empty.sum())} of {len(empty)} trained positions: it was made with other "
            "labels masked; score with the labels that are trained"
        )
    if int(frozen.topk_ids.max()) >= vocab:
        raise ShapeError(
            f"reference.topk_ids holds id {int(frozen.topk_ids.max())}, the live vocabulary ends at {vocab - 1}; "
            "score again with the tokenizer and model that are trained"
        )
    if frozen.tail_policy in NO_TAIL or frozen.tail_log_mass is None:
        return
    pieces = zip(
        *(v.split(CHECKED_TOKENS) for v in (frozen.topk_ids, frozen.topk_log_probs, frozen.tail_log_mass)), strict=True
    )
    error = float(torch.stack([_sum_error(*piece) for piece in pieces]).max())
    if not error < 0.02:  # bf16 storage moves log-probs by up to 8e-3
        raise ShapeError(
            f"top-k probabilities and tail mass sum to one only within {error:.3g}; expected log-probs at "
            "temperature 1 and tail_log_mass = log(1 - listed mass)"
        )


CHECKED_TOKENS = 4096
"""Tokens whose sum is checked at once: in float64 a whole batch's top k would take more memory than a chunk of logits."""


def _sum_error(
    ids: Int[Tensor, "tokens k"], log_probs: Float[Tensor, "tokens k"], tail: Float[Tensor, " tokens"]
) -> Tensor:
    """How far some token's probabilities and tail are from summing to one; NaN if some are."""
    kept = log_probs.double().masked_fill(~listed_once(ids), -torch.inf).exp().sum(-1)
    return (kept + tail.double().exp() - 1).abs().max()
