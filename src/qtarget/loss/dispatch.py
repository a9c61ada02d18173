"""From the public arguments to one backend: flatten, drop masked tokens, check, run, divide once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import torch

from qtarget.core.errors import HyperparameterError, IncompatibleError, MissingStatisticError, ShapeError
from qtarget.core.outcomes import check_outcomes
from qtarget.core.reductions import Reduction, denominator
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.statistics import check_frozen, check_labels, check_sampled, token_statistics
from qtarget.core.types import FrozenHead, Reference, Target, TokenView, WeightsScale, project
from qtarget.loss.backends import Backend, choose, plan_of
from qtarget.loss.chunked import chunked_loss_sum, frozen_label_statistics, label_statistics, wanted
from qtarget.loss.dense import dense_token_losses
from qtarget.loss.head import Head
from qtarget.loss.result import LossRequest, TokenReport
from qtarget.loss.vocabulary import vocabulary_of


def check_rows(rows: Tensor, labels: Tensor) -> None:
    """Raise unless there is one row for each label."""
    if rows.shape[:-1] != labels.shape:
        raise ShapeError(
            f"inputs have leading shape {tuple(rows.shape[:-1])}, labels {tuple(labels.shape)}; labels are already shifted"
        )


def build_request(
    rows: Float[Tensor, "... features"],
    labels: Int[Tensor, "..."],
    target: Target,
    vocab: int,
    *,
    reference: Reference | FrozenHead | None,
    teacher: Reference | FrozenHead | None,
    sequence_ids: Int[Tensor, "..."] | None,
    loss_weights: Float[Tensor, "..."] | None,
    weights_scale: WeightsScale,
    label_weights: Float[Tensor, "..."] | None,
    ignore_index: int,
    want_report: bool,
    rollout: Reference | None = None,
    advantages: Float[Tensor, "..."] | None = None,
) -> tuple[Int[Tensor, " kept"], LossRequest]:
    """Indices of the supervised tokens among the flat ones, and the request for exactly those.

    Raises:
        ShapeError: anything that does not line up with the labels, or a label outside the vocabulary.
        HyperparameterError: a loss weight is negative or not finite, or no such ``weights_scale``.
        MissingStatisticError: the target needs a number of a frozen model, or advantages, that were not given.
        IncompatibleError: advantages that the target would not read.
    """
    leading = tuple(labels.shape)
    check_rows(rows, labels)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError(f"labels are {labels.dtype}; expected token ids, torch.long")
    check_frozen(reference, target.needs.reference, target.name, "reference")
    check_frozen(teacher, target.needs.teacher, target.name, "teacher")
    check_sampled(target, reference, "reference")
    check_sampled(target, teacher, "teacher")
    check_policy(target, rollout, advantages)
    flat_labels = labels.reshape(-1)
    if weights_scale not in get_args(WeightsScale):
        raise HyperparameterError(
            f"weights_scale {weights_scale!r} is unknown; expected {', '.join(get_args(WeightsScale))}"
        )
    supervised = flat_labels != ignore_index
    if loss_weights is not None:
        supervised = supervised & check_weights(loss_weights, leading, supervised, weights_scale)
    kept = supervised.nonzero()[:, 0]
    trained = flat_labels[kept]
    check_labels(trained, vocab, ignore_index)
    # a row of [batch, time] labels is a sequence; flat tokens cannot be told apart, so their ids must be given
    if sequence_ids is None and len(leading) == 2:
        sequence_ids = torch.arange(leading[0], device=labels.device)[:, None].expand(leading)

    def select(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        check_aligned(name, value, leading)
        # constants: the gradient that is made in the forward pass is by hidden states and head alone
        value = value.detach().reshape(-1)[kept]
        return value.to(torch.promote_types(rows.dtype, torch.float32)) if value.is_floating_point() else value

    models: dict[str, Any] = {"reference": reference, "teacher": teacher, "rollout": rollout}
    models = {role: None if m is None else m.flatten(leading) for role, m in models.items()}
    if len(kept) < len(flat_labels):  # else a copy of k numbers a token
        models = {role: None if m is None else m.rows(kept) for role, m in models.items()}
    # after the cut: masked positions may list no token, trained ones must
    for model in models.values():
        check_outcomes(model, vocab)
    request = LossRequest(
        target,
        trained,
        **models,
        advantages=select("advantages", advantages),
        sequence_ids=select("sequence_ids", sequence_ids),
        label_weights=select("label_weights", label_weights),
        loss_weights=select("loss_weights", loss_weights),
        weights_scale=weights_scale,
        want_report=want_report,
    )
    check_samples(request)
    return kept, request


def check_policy(target: Target, rollout: Reference | None, advantages: Tensor | None) -> None:
    """Raise unless advantages come with a target that reads them, and the rollout with what is read of it.

    Raises:
        MissingStatisticError: no advantages, or a rollout without the numbers that the target reads.
        IncompatibleError: advantages or a rollout that the target would not read, or a rollout that is no ``Reference``.
    """
    if target.needs.advantages and advantages is None:
        raise MissingStatisticError(
            f"target {target.name!r} weighs samples by their advantages, which were not given; pass advantages=..., one a label"
        )
    if not target.needs.advantages and (advantages is not None or rollout is not None):
        raise IncompatibleError(
            f"target {target.name!r} reads no advantages and no rollout; leave them out, or choose a trust region "
            "(`qtarget targets`) or qtarget.Regularised(region, target)"
        )
    if rollout is None:
        return
    if not isinstance(rollout, Reference):
        raise IncompatibleError(f"rollout= is a {type(rollout).__name__}; expected a qtarget.Reference")
    check_frozen(rollout, frozenset({"label_log_probs"}) | target.needs.rollout, target.name, "rollout")


def check_samples(request: LossRequest) -> None:
    """Raise where a supervised sample has no advantage or no log-prob of the policy that drew it.

    Raises:
        HyperparameterError: NaN or infinity.
    """
    values = {"advantages": request.advantages}
    if request.rollout is not None:
        values["rollout.label_log_probs"] = request.rollout.label_log_probs
    for name, value in values.items():
        if value is not None and not bool(value.isfinite().all()):
            raise HyperparameterError(
                f"{name} hold NaN or infinity at {int((~value.isfinite()).sum())} of {len(value)} supervised tokens; mask these "
                "labels: what was not scored cannot be weighed"
            )


def check_aligned(name: str, value: Tensor, leading: tuple[int, ...]) -> None:
    """Raise unless there is one value for each label."""
    if tuple(value.shape) != leading:
        raise ShapeError(f"{name} has shape {tuple(value.shape)}, labels {leading}; expected one value a label")


def check_weights(
    loss_weights: Float[Tensor, "..."], leading: tuple[int, ...], supervised: Tensor, scale: WeightsScale
) -> Tensor:
    """Which flat tokens the weights leave in: all but those of weight 0, or all where only labels are scaled.

    Raises:
        ShapeError: there is not one weight for each label.
        HyperparameterError: the weight of a supervised token is negative or not finite.
    """
    check_aligned("loss_weights", loss_weights, leading)
    flat = loss_weights.detach().reshape(-1)
    if bool((supervised & ~(flat.isfinite() & (flat >= 0))).any()):
        raise HyperparameterError(
            "loss_weights hold a negative or non-finite number; expected finite weights of at least 0: pushing a token's "
            "probability down is another objective (unlikelihood), whose loss has no lower bound in this form"
        )
    return flat != 0 if scale == "all" else torch.ones_like(supervised)


def with_batch_weights(request: LossRequest, label_log_probs: Float[Tensor, " tokens"], vocab: int) -> LossRequest:
    """Fill in the label weights of a sequence- or batch-scope target from this call's tokens.

    Raises:
        MissingStatisticError: tokens cannot be told apart by sequence.
    """
    weights = batch_label_weights(
        request.target, label_log_probs, request.reference, request.sequence_ids, request.labels, vocab
    )
    return replace(request, label_weights=weights)


@torch.no_grad()
def batch_label_weights(
    target: Target,
    label_log_probs: Float[Tensor, " tokens"],
    reference: Reference | FrozenHead | None,
    sequence_ids: Int[Tensor, " tokens"] | None,
    labels: Int[Tensor, " tokens"] | None = None,
    vocab: int = 0,
) -> Float[Tensor, " tokens"]:
    """Label weights of a sequence- or batch-scope target over all tokens given (see ``qtarget.label_weights``)."""
    rule = getattr(target, "label_weights", None)
    if rule is None:
        raise IncompatibleError(f"target {target.name!r} has no label weights of its own; call its loss instead")
    if sequence_ids is None:
        raise MissingStatisticError(
            f"target {target.name!r} works on whole sequences; pass labels as [batch, time] or give sequence_ids"
        )
    if isinstance(reference, FrozenHead):
        assert labels is not None
        reference = frozen_label_statistics(reference, labels)
    view = TokenView(label_log_probs.detach(), vocab, reference=reference, sequence_ids=sequence_ids)
    return rule(view).detach()


def unflatten(report: TokenReport | None, kept: Tensor, leading: tuple[int, ...]) -> TokenReport | None:
    """Back to the labels' shape, zero where masked."""
    if report is None:
        return None
    count = 1
    for size in leading:
        count *= size
    return report.map(
        lambda v: torch.zeros(count, dtype=v.dtype, device=v.device).index_copy(0, kept, v).reshape(leading)
    )


def loss_from_logits(
    logits: Float[Tensor, "... vocab"],
    labels: Int[Tensor, "..."],
    target: Target,
    *,
    num_items: int | Tensor | None,
    reduction: Reduction,
    **inputs,
) -> tuple[Tensor, Tensor, TokenReport | None]:
    """Reduced loss, detached per-token losses and report, through full logits."""
    vocab = logits.shape[-1]
    kept, request = build_request(logits, labels, target, vocab, **inputs)
    divide_by = denominator(len(kept), num_items, reduction)
    rows = logits.reshape(-1, vocab)[kept]
    if target.scope != "token" and request.label_weights is None:
        live = token_statistics(rows.detach(), request.labels)
        assert live.label_log_probs is not None
        request = with_batch_weights(request, live.label_log_probs, vocab)
    losses, report = dense_token_losses(rows, request)
    full = torch.zeros(labels.numel(), dtype=losses.dtype, device=losses.device).index_copy(0, kept, losses)
    full = full.reshape(labels.shape)
    if reduction == "none":
        return full, full.detach(), unflatten(report, kept, tuple(labels.shape))
    return losses.sum() / divide_by, full.detach(), unflatten(report, kept, tuple(labels.shape))


def loss_from_hidden(
    hidden: Float[Tensor, "... width"],
    head: Head,
    labels: Int[Tensor, "..."],
    target: Target,
    *,
    num_items: int | Tensor | None,
    reduction: Reduction,
    backend: Backend,
    chunk_size: int | None,
    logits_dtype: torch.dtype | None,
    vocab_group: Any,
    **inputs,
) -> tuple[Tensor, TokenReport | None]:
    """Reduced loss and report from hidden states.

    Raises:
        HyperparameterError: unknown backend, or ``reduction="none"``, whose gradient cannot be made in the forward pass.
    """
    vocabulary = vocabulary_of(head.check(hidden.shape[-1]).weight, vocab_group)
    kept, request = build_request(hidden, labels, target, vocabulary.size, **inputs)
    rows = hidden.reshape(-1, hidden.shape[-1])
    name, _ = choose(backend, rows, request, sharded=vocab_group is not None)
    if name == "dense":
        dropped = torch.ones_like(labels, dtype=torch.bool).reshape(-1).index_fill(0, kept, False)
        rows = rows.masked_fill(dropped[:, None], 0.0)  # else 0 x NaN reaches the head's gradient
        logits = project(rows, head.weight, head.bias, head.scale, head.softcap, exact=target.needs.soft)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        loss, _, report = loss_from_logits(logits, labels, target, num_items=num_items, reduction=reduction, **inputs)
        return loss, report
    if reduction == "none":
        raise HyperparameterError(
            "linear_target_loss computes gradients in its forward pass, so losses cannot be weighted afterwards; "
            "pass loss_weights=..., use return_report=True to look at them, or backend='dense'"
        )
    divide_by = denominator(len(kept), num_items, reduction)
    index = None if len(kept) == len(rows) else kept
    plan = plan_of(name, rows, head, request, chunk_size, logits_dtype, vocabulary.widest)
    for role in ("reference", "teacher"):
        model = getattr(request, role)
        # a target that reads two numbers of the frozen model gets them now, and no frozen logits beside the live ones
        if isinstance(model, FrozenHead) and not wanted(target.needs, role):
            request = replace(request, **{role: frozen_label_statistics(model, request.labels)})
    known = None
    if target.scope != "token" and request.label_weights is None:
        live, sums = label_statistics(
            rows,
            head,
            request.labels,
            index,
            precision=plan.precision,
            kernels=plan.kernels,
            vocabulary=vocabulary,
        )
        assert live.label_log_probs is not None
        request = with_batch_weights(request, live.label_log_probs, vocabulary.size)
        known = None if target.needs.soft else sums  # other special columns leave another rest
    total, report = chunked_loss_sum(rows, head, vocabulary, request, plan, index, known)
    return total / divide_by, unflatten(report, kept, tuple(labels.shape))
