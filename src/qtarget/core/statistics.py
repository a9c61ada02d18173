"""The few numbers through which every target sees the logits.

``token_view`` computes them with ordinary tensor operations, so under autograd it is the readable oracle. The chunked
loss computes them without a graph and leaves the derivative to ``coefficients.py``.
"""

from __future__ import annotations

from typing import Literal

import torch

from qtarget.core.errors import HyperparameterError, IncompatibleError, MissingStatisticError, ShapeError
from qtarget.core.outcomes import align, shared_outcomes, tail_log_mass
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.types import (
    DATA_FIELDS,
    FrozenHead,
    Needs,
    Outcomes,
    Reference,
    Target,
    TokenView,
    missing_message,
    project,
    sampled_message,
)


def entropy_of(log_probs: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """``-sum p log p`` in nats; tokens of probability zero count zero."""
    return -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)


def check_frozen(frozen: Reference | FrozenHead | None, fields: frozenset[str], target: str, role: str) -> None:
    """Raise before any work when the target needs what was not given.

    Raises:
        MissingStatisticError: names the target, the field, and how to get it.
    """
    if not isinstance(frozen, Reference | FrozenHead | None):
        raise IncompatibleError(
            f"{role}= is a {type(frozen).__name__}; expected a qtarget.Reference (qtarget.token_statistics or "
            "Reference.from_logits makes one) or a qtarget.FrozenHead"
        )
    for field in sorted(fields):
        if frozen is None:
            raise MissingStatisticError(missing_message(target, role, field))
        if isinstance(frozen, FrozenHead) and field not in DATA_FIELDS:
            continue
        present = frozen.has_distribution if field == "distribution" else getattr(frozen, field, None) is not None
        if not present:
            raise MissingStatisticError(missing_message(target, role, field))


def check_labels(labels: Int[Tensor, " tokens"], vocab: int, ignore_index: int) -> None:
    """Raise unless these labels, none of them masked, are ids of the vocabulary.

    Raises:
        ShapeError: names the range found, and the vocabulary.
    """
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        raise ShapeError(
            f"labels range from {int(labels.min())} to {int(labels.max())}, the vocabulary has {vocab} entries; "
            f"masked positions carry {ignore_index}"
        )


def check_sampled(target: Target, frozen: Reference | FrozenHead | None, role: str) -> None:
    """Refuse draws where they would bias the gradient.

    Raises:
        IncompatibleError: the reference was sampled, and the target is not linear in the distribution it reads.
    """
    sampled = isinstance(frozen, Reference) and frozen.log_probs is None and frozen.tail_policy == "sampled"
    if sampled and "distribution" in getattr(target.needs, role) and not target.linear_in_frozen:
        raise IncompatibleError(sampled_message(target.name, role))


def token_view(
    log_probs: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    needs: Needs,
    reference: Reference | FrozenHead | None = None,
    teacher: Reference | FrozenHead | None = None,
    sequence_ids: Int[Tensor, " tokens"] | None = None,
    label_weights: Float[Tensor, " tokens"] | None = None,
    advantages: Float[Tensor, " tokens"] | None = None,
    rollout: Reference | None = None,
) -> TokenView:
    """The statistics that ``needs`` names, from the live log-softmax; differentiable in it wherever gradients are enabled."""
    frozen = {"reference": reference, "teacher": teacher}
    resolved = {role: None if m is None else m.resolve(labels) for role, m in frozen.items()}
    outcomes: dict[str, Outcomes | None] = {"reference": None, "teacher": None}
    for role, wanted in (("reference", needs.reference), ("teacher", needs.teacher)):
        model = resolved[role]
        if model is not None and {"distribution", "log_probs"} & wanted:
            outcomes[role] = shared_outcomes(log_probs, align(model, log_probs))
    sampled = None
    if rollout is not None and needs.rollout:
        sampled = shared_outcomes(log_probs.detach(), align(rollout, log_probs))
    return TokenView(
        label_log_probs=log_probs.gather(-1, labels[:, None])[:, 0],
        vocab_size=log_probs.shape[-1],
        entropy=entropy_of(log_probs) if needs.entropy else None,
        mean_log_prob=log_probs.mean(-1) if needs.mean_log_prob else None,
        top_log_probs=largest(log_probs.detach(), needs.top_k) if needs.top_k else None,
        log_probs=log_probs if needs.log_probs else None,
        on_reference=outcomes["reference"],
        on_teacher=outcomes["teacher"],
        reference=resolved["reference"],
        teacher=resolved["teacher"],
        sequence_ids=sequence_ids,
        label_weights=label_weights,
        advantages=advantages,
        rollout=rollout,
        on_rollout=sampled,
    )


def largest(logits: Float[Tensor, "tokens vocab"], k: int) -> Float[Tensor, "tokens k"]:
    """The k largest logits, descending.

    Raises:
        HyperparameterError: k exceeds the vocabulary.
    """
    if k > logits.shape[-1]:
        raise HyperparameterError(f"top_k={k} exceeds the vocabulary of {logits.shape[-1]}; choose a smaller top_k")
    return logits.topk(k, dim=-1).values


@torch.no_grad()
def token_statistics(
    logits: Float[Tensor, "... vocab"] | None = None,
    labels: Int[Tensor, "..."] | None = None,
    *,
    hidden: Float[Tensor, "... width"] | None = None,
    lm_head_weight: Float[Tensor, "vocab width"] | None = None,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    top_k: int = 0,
    tail_policy: Literal["bucket", "spread", "renormalize"] = "bucket",
    ignore_index: int = -100,
    chunk_size: int = 512,
) -> Reference:
    """Label log-probs, entropy and top-k with tail mass of a model, from logits or from hidden states in chunks.

    Args:
        logits: ``[..., vocab]``; or give ``hidden`` and ``lm_head_weight`` instead.
        labels: ``[...]``, already shifted; ``ignore_index`` rows get zeros, ids ``-1`` and top-k log-probs of minus
            infinity. A loss whose own labels are not masked there refuses the reference.
        top_k: how many of the largest log-probs to keep; 0 for none.
        chunk_size: tokens whose logits exist at once.

    Returns:
        A ``Reference`` with the labels' leading shape, detached, float32 (float64 for float64 input), temperature 1.

    Raises:
        ShapeError: labels and inputs do not line up, a label is outside the vocabulary, or both or neither input is given.
        HyperparameterError: ``top_k`` exceeds the vocabulary or is negative, or ``chunk_size`` is below 1.

    Example:
        >>> import torch, qtarget
        >>> stats = qtarget.token_statistics(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]), top_k=1)
        >>> stats.label_log_probs.exp()
        tensor([[0.2500, 1.0000]])
    """
    if labels is None:
        raise ShapeError("token_statistics needs labels, one for each row of logits")
    rows, head = (logits, None) if hidden is None else (hidden, lm_head_weight)
    if rows is None or (logits is not None and hidden is not None) or (hidden is not None and head is None):
        raise ShapeError("give either logits, or hidden together with lm_head_weight")
    if rows.shape[:-1] != labels.shape:
        raise ShapeError(
            f"inputs have leading shape {tuple(rows.shape[:-1])}, labels {tuple(labels.shape)}; expected equal"
        )
    vocab = rows.shape[-1] if head is None else head.shape[0]
    if not 0 <= top_k <= vocab:
        raise HyperparameterError(f"top_k={top_k}; expected 0 (none) to {vocab}, the size of the vocabulary")
    if chunk_size < 1:
        raise HyperparameterError(f"chunk_size={chunk_size}; expected at least one token a chunk")
    flat_labels = labels.reshape(-1)
    kept = (flat_labels != ignore_index).nonzero()[:, 0]
    check_labels(flat_labels[kept], vocab, ignore_index)
    flat = rows.reshape(-1, rows.shape[-1])
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = {
        "label_log_probs": torch.zeros(len(flat), dtype=dtype, device=rows.device),
        "entropy": torch.zeros(len(flat), dtype=dtype, device=rows.device),
    }
    if top_k:
        out["topk_ids"] = torch.full((len(flat), top_k), -1, dtype=torch.long, device=rows.device)
        out["topk_log_probs"] = torch.full((len(flat), top_k), -torch.inf, dtype=dtype, device=rows.device)
        out["tail_log_mass"] = torch.zeros(len(flat), dtype=dtype, device=rows.device)
    for index in kept.split(chunk_size):
        chunk = (
            flat[index].to(dtype)
            if head is None
            else project(flat[index], head, bias, logit_scale, logit_softcap, exact=True)
        )
        for name, value in statistics_of(chunk, flat_labels[index], top_k).items():
            out[name][index] = value.to(out[name].dtype)
    shaped = {name: value.reshape(*labels.shape, *value.shape[1:]) for name, value in out.items()}
    return Reference(**shaped, tail_policy=tail_policy)


def statistics_of(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"], top_k: int
) -> dict[str, Tensor]:
    """The fields of a ``Reference`` for one chunk of logits."""
    log_probs = logits.log_softmax(-1)
    out = {"label_log_probs": log_probs.gather(-1, labels[:, None])[:, 0], "entropy": entropy_of(log_probs)}
    if top_k:
        out["topk_log_probs"], out["topk_ids"] = log_probs.topk(top_k, dim=-1)
        out["tail_log_mass"] = tail_log_mass(
            log_probs, out["topk_ids"], torch.ones_like(out["topk_ids"], dtype=torch.bool)
        )
    return out
