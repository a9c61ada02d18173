"""The few numbers through which every target sees the logits, and their derivatives.

``token_view`` computes them with ordinary tensor operations, so under autograd it is the readable oracle. The chunked
loss computes them without a graph, lets autograd differentiate the target on these small tensors, and hands the
coefficients to ``logit_gradient``, which needs no knowledge of any method.

| statistic | derivative by logit j |
|---|---|
| ``log p_k`` | ``[j = k] - p_j`` |
| ``log s``, ``s`` the mass outside some ids | ``p_j [j outside] / s - p_j`` |
| entropy ``H`` | ``-p_j (log p_j + H)`` |
| mean log-prob | ``1/V - p_j`` |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

import torch

from qtarget.errors import HyperparameterError, MissingStatisticError, ShapeError
from qtarget.shapes import Bool, Float, Int, Tensor
from qtarget.types import FrozenHead, Needs, Outcomes, Reference, Target, Terms, TokenView, missing_message, project

ABSENT = -1e30
"""Log-prob of an outcome that does not exist: finite, so that absent minus absent is 0 and not NaN."""


def log_normalizer(logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """``log sum_v exp(z_v)`` in nats."""
    return torch.logsumexp(logits, dim=-1)


def entropy_of(logits: Float[Tensor, "tokens vocab"], lse: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """``-sum p log p`` in nats; logits of minus infinity (banned tokens) count zero."""
    finite = logits.masked_fill(logits == -torch.inf, 0.0)
    return lse - ((logits - lse[:, None]).exp() * finite).sum(-1)


def listed_once(ids: Int[Tensor, "tokens k"]) -> Bool[Tensor, "tokens k"]:
    """Which slots name a token that no earlier slot of the row names (``-1`` marks an unused slot)."""
    order = ids.argsort(dim=-1, stable=True)
    ascending = ids.gather(-1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ascending[:, 1:] == ascending[:, :-1]
    return torch.zeros_like(repeated).scatter(-1, order, ~repeated) & (ids >= 0)


def outside(
    logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, "tokens k"], listed: Bool[Tensor, "tokens k"]
) -> Float[Tensor, "tokens vocab"]:
    """The logits with those at the listed ids set to minus infinity."""
    vocab = logits.shape[-1]
    hit = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)
    hit.scatter_(-1, torch.where(listed, ids, vocab), True)  # unlisted slots hit a last column that is cut off
    return logits.masked_fill(hit[:, :vocab], -torch.inf)


def tail_log_mass(
    logits: Float[Tensor, "tokens vocab"],
    lse: Float[Tensor, " tokens"],
    ids: Int[Tensor, "tokens k"],
    listed: Bool[Tensor, "tokens k"],
) -> Float[Tensor, " tokens"]:
    """Log of the probability outside ``ids``, summed over the rest and never as ``1 - sum``: nothing cancels."""
    rest = outside(logits, ids, listed)
    empty = (rest == -torch.inf).all(-1)
    mass = torch.where(empty[:, None], 0.0, rest).logsumexp(-1) - lse
    return mass.masked_fill(empty, ABSENT)


# -- alignment of a frozen model's outcomes with the live one's ---------------------------------------------------


def frozen_outcomes(frozen: Reference, listed: Bool[Tensor, "tokens k"], like: Tensor) -> Float[Tensor, "tokens k_1"]:
    """Frozen log-probs of the k listed tokens and, last, of everything else, under the reference's tail policy."""
    assert frozen.topk_log_probs is not None
    kept = frozen.topk_log_probs.to(like.dtype).masked_fill(~listed, ABSENT)
    if frozen.tail_policy == "renormalize":
        tail = torch.full_like(kept[:, :1], ABSENT)
        return torch.cat([kept - kept.logsumexp(-1, keepdim=True), tail], dim=-1)
    assert frozen.tail_log_mass is not None
    tail = frozen.tail_log_mass.to(like.dtype)[:, None]
    joined = torch.cat([kept, tail], dim=-1)
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


def align(frozen: Reference, logits: Float[Tensor, "tokens vocab"]) -> Alignment:
    """Choose the outcomes on which live and frozen model are compared."""
    if frozen.log_probs is not None:
        return Alignment(frozen.log_probs.to(logits.dtype))
    assert frozen.topk_ids is not None
    listed = listed_once(frozen.topk_ids)
    if frozen.tail_policy == "spread":
        return Alignment(spread_log_probs(frozen, listed, logits))
    return Alignment(frozen_outcomes(frozen, listed, logits), frozen.topk_ids.clamp(min=0), listed)


def shared_outcomes(logits: Float[Tensor, "tokens vocab"], lse: Float[Tensor, " tokens"], at: Alignment) -> Outcomes:
    """Live log-probs on the aligned outcomes."""
    if at.ids is None or at.listed is None:
        return Outcomes(logits - lse[:, None], at.frozen)
    log_probs = (logits.gather(-1, at.ids) - lse[:, None]).masked_fill(~at.listed, ABSENT)
    tail = tail_log_mass(logits, lse, at.ids, at.listed)
    return Outcomes(torch.cat([log_probs, tail[:, None]], dim=-1), at.frozen)


# -- the view a target gets --------------------------------------------------------------------------------------


def check_frozen(frozen: Reference | FrozenHead | None, fields: frozenset[str], target: str, role: str) -> None:
    """Raise before any work when the target needs what was not given.

    Raises:
        MissingStatisticError: names the target, the field, and how to get it.
    """
    for field in sorted(fields):
        if frozen is None:
            raise MissingStatisticError(missing_message(target, role, field))
        if isinstance(frozen, FrozenHead):
            continue
        present = frozen.has_distribution if field == "distribution" else getattr(frozen, field) is not None
        if not present:
            raise MissingStatisticError(missing_message(target, role, field))


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
    if int(frozen.topk_ids.max()) >= vocab:
        raise ShapeError(
            f"reference.topk_ids holds id {int(frozen.topk_ids.max())}, the live vocabulary ends at {vocab - 1}; "
            "score again with the tokenizer and model that are trained"
        )
    if frozen.tail_policy == "renormalize" or frozen.tail_log_mass is None:
        return
    kept = frozen.topk_log_probs.double().masked_fill(~listed_once(frozen.topk_ids), -torch.inf).exp().sum(-1)
    error = float((kept + frozen.tail_log_mass.double().exp() - 1).abs().max())
    if not error < 0.02:  # bf16 storage moves log-probs by up to 8e-3
        raise ShapeError(
            f"top-k probabilities and tail mass sum to one only within {error:.3g}; expected log-probs at "
            "temperature 1 and tail_log_mass = log(1 - listed mass)"
        )


def token_view(
    logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    needs: Needs,
    reference: Reference | FrozenHead | None = None,
    teacher: Reference | FrozenHead | None = None,
    sequence_ids: Int[Tensor, " tokens"] | None = None,
    label_weights: Float[Tensor, " tokens"] | None = None,
) -> TokenView:
    """The statistics that ``needs`` names. Differentiable in ``logits`` wherever gradients are enabled."""
    lse = log_normalizer(logits)
    frozen = {"reference": reference, "teacher": teacher}
    resolved = {role: None if m is None else m.resolve(labels) for role, m in frozen.items()}
    outcomes: dict[str, Outcomes | None] = {"reference": None, "teacher": None}
    for role, wanted in (("reference", needs.reference), ("teacher", needs.teacher)):
        model = resolved[role]
        if model is not None and {"distribution", "log_probs"} & wanted:
            outcomes[role] = shared_outcomes(logits, lse, align(model, logits))
    return TokenView(
        label_log_probs=logits.gather(-1, labels[:, None])[:, 0] - lse,
        vocab_size=logits.shape[-1],
        entropy=entropy_of(logits, lse) if needs.entropy else None,
        mean_log_prob=logits.mean(-1) - lse if needs.mean_log_prob else None,
        top_log_probs=largest(logits.detach(), needs.top_k) - lse.detach()[:, None] if needs.top_k else None,
        log_probs=logits - lse[:, None] if needs.log_probs else None,
        on_reference=outcomes["reference"],
        on_teacher=outcomes["teacher"],
        reference=resolved["reference"],
        teacher=resolved["teacher"],
        sequence_ids=sequence_ids,
        label_weights=label_weights,
    )


def largest(logits: Float[Tensor, "tokens vocab"], k: int) -> Float[Tensor, "tokens k"]:
    """The k largest logits, descending.

    Raises:
        HyperparameterError: k exceeds the vocabulary.
    """
    if k > logits.shape[-1]:
        raise HyperparameterError(f"top_k={k} exceeds the vocabulary of {logits.shape[-1]}; choose a smaller top_k")
    return logits.topk(k, dim=-1).values


# -- coefficients to gradient ------------------------------------------------------------------------------------

LEAVES = ("label_log_probs", "entropy", "mean_log_prob", "log_probs", "on_reference", "on_teacher")


def savable(view: TokenView) -> TokenView:
    """The same view in tensors that autograd may save: those made under ``torch.inference_mode`` are copied."""
    if not view.label_log_probs.is_inference():
        return view

    def copy(value):
        if isinstance(value, Outcomes):
            return Outcomes(value.model.clone(), value.frozen.clone())
        if isinstance(value, Reference):
            return value.map_tensors(lambda _, tensor: tensor.clone())
        return value.clone() if isinstance(value, Tensor) else value

    return replace(view, **{f.name: copy(getattr(view, f.name)) for f in fields(view)})


def leaf_view(view: TokenView) -> tuple[TokenView, dict[str, Tensor]]:
    """Cut the view from the logits: each live statistic becomes a leaf that autograd differentiates by."""
    leaves: dict[str, Tensor] = {}
    cut: dict[str, Tensor | Outcomes] = {}
    view = savable(view)
    for name in LEAVES:
        value = getattr(view, name)
        if isinstance(value, Outcomes):
            leaves[name] = value.model.detach().requires_grad_()
            cut[name] = Outcomes(leaves[name], value.frozen)
        elif value is not None:
            leaves[name] = value.detach().requires_grad_()
            cut[name] = leaves[name]
    return replace(view, **cut), leaves  # pyright: ignore[reportArgumentType]


def coefficients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Derivative of a summed target loss by each statistic; statistics without influence are left out."""
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def logit_gradient(
    logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    weights: dict[str, Tensor],
    reference: Reference | None = None,
    teacher: Reference | None = None,
) -> Float[Tensor, "tokens vocab"]:
    """Gradient by the logits of a loss with these coefficients: the table at the top of this file, summed."""
    lse = log_normalizer(logits)
    log_probs = logits - lse[:, None]
    probs = log_probs.exp()
    on_p = torch.zeros_like(lse)  # everything that multiplies p alone
    gradient = torch.zeros_like(logits)
    if (c := weights.get("label_log_probs")) is not None:
        gradient.scatter_add_(-1, labels[:, None], c[:, None])
        on_p -= c
    if (c := weights.get("mean_log_prob")) is not None:
        gradient += (c / logits.shape[-1])[:, None]
        on_p -= c
    if (c := weights.get("log_probs")) is not None:
        gradient += c
        on_p -= c.sum(-1)
    if (c := weights.get("entropy")) is not None:
        finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
        gradient -= c[:, None] * probs * (finite + entropy_of(logits, lse)[:, None])
    for name, frozen in (("on_reference", reference), ("on_teacher", teacher)):
        if (c := weights.get(name)) is not None:
            assert frozen is not None
            at = align(frozen, logits)
            if at.ids is None or at.listed is None:
                gradient += c
                on_p -= c.sum(-1)
            else:
                on_p -= scatter_outcomes(gradient, logits, c, at.ids, at.listed)
    return gradient.addcmul_(probs, on_p[:, None])


def scatter_outcomes(
    gradient: Float[Tensor, "tokens vocab"],
    logits: Float[Tensor, "tokens vocab"],
    c: Float[Tensor, "tokens k_1"],
    ids: Int[Tensor, "tokens k"],
    listed: Bool[Tensor, "tokens k"],
) -> Float[Tensor, " tokens"]:
    """Add the coefficients of k listed log-probs and the tail to ``gradient``; return what they take from ``p``."""
    c = c.masked_fill(torch.cat([~listed, torch.zeros_like(listed[:, :1])], dim=-1), 0.0)
    gradient.scatter_add_(-1, ids, c[:, :-1])
    rest = outside(logits, ids, listed)
    empty = (rest == -torch.inf).all(-1)
    tail = c[:, -1].masked_fill(empty, 0.0)
    gradient += tail[:, None] * torch.where(empty[:, None], 0.0, rest).softmax(-1)
    return c[:, :-1].sum(-1) + tail


@dataclass(frozen=True)
class Differentiated:
    """A target's terms (detached) and their coefficients, statistic by statistic."""

    terms: Terms
    label: dict[str, Tensor]
    residual: dict[str, Tensor]

    def combined(self, loss_weights: Tensor | None) -> dict[str, Tensor]:
        """Coefficients of ``loss_weights * label + residual``."""
        weighted = dict(self.label)
        if loss_weights is not None:
            weighted = {n: c * (loss_weights if c.dim() == 1 else loss_weights[:, None]) for n, c in self.label.items()}
        for name, c in self.residual.items():
            weighted[name] = weighted[name] + c if name in weighted else c
        return weighted

    def pulls(self, loss_weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of each token: minus the sum of the log-probs' coefficients, label term and residual term.

        A pull of negative weight (gem's) comes out negative; entropy pulls towards nothing and is left out.
        """
        zero = torch.zeros_like(next(v for v in (self.terms.label, self.terms.residual) if v is not None))
        label, residual = (
            sum((-(c if c.dim() == 1 else c.sum(-1)) for n, c in part.items() if n != "entropy"), zero)
            for part in (self.label, self.residual)
        )
        return (label if loss_weights is None else label * loss_weights), residual


def differentiate(target: Target, view: TokenView) -> Differentiated:
    """Let autograd differentiate a target on its small tensors."""
    with torch.inference_mode(False), torch.enable_grad():  # under either, all coefficients would be zero
        cut, leaves = leaf_view(view)
        terms = target.losses(cut)
        label, residual = (
            {} if term is None else coefficients(term.sum(), leaves) for term in (terms.label, terms.residual)
        )
    detached = Terms(*(None if term is None else term.detach() for term in (terms.label, terms.residual)))
    return Differentiated(detached, label, residual)


# -- public ------------------------------------------------------------------------------------------------------


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
        labels: ``[...]``, already shifted; ``ignore_index`` rows get zeros (and ids ``-1``).
        top_k: how many of the largest log-probs to keep; 0 for none.
        chunk_size: tokens whose logits exist at once.

    Returns:
        A ``Reference`` with the labels' leading shape, detached, float32 (float64 for float64 input), temperature 1.

    Raises:
        ShapeError: labels and inputs do not line up, or both or neither input is given.
        HyperparameterError: ``top_k`` exceeds the vocabulary.

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
    flat_labels = labels.reshape(-1)
    kept = (flat_labels != ignore_index).nonzero()[:, 0]
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
    lse = log_normalizer(logits)
    out = {
        "label_log_probs": logits.gather(-1, labels[:, None])[:, 0] - lse,
        "entropy": entropy_of(logits, lse),
    }
    if top_k:
        largest(logits, top_k)  # refuses a k beyond the vocabulary
        values, ids = logits.topk(top_k, dim=-1)
        listed = torch.ones_like(ids, dtype=torch.bool)
        out["topk_ids"], out["topk_log_probs"] = ids, values - lse[:, None]
        out["tail_log_mass"] = tail_log_mass(logits, lse, ids, listed)
    return out
