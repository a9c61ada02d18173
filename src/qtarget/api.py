"""The two losses, and the weights of targets that must see a whole batch."""

from __future__ import annotations

from typing import Any

import torch

from qtarget.composed.combined import Combined
from qtarget.core.errors import ShapeError
from qtarget.core.reductions import Reduction
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.statistics import check_frozen
from qtarget.core.types import FrozenHead, Reference, Target, WeightsScale
from qtarget.loss.backends import Backend, BackendChoice, explain
from qtarget.loss.dispatch import batch_label_weights, loss_from_hidden, loss_from_logits
from qtarget.loss.head import Head
from qtarget.registry import get_target


def target_loss(
    logits: Float[Tensor, "... vocab"],
    labels: Int[Tensor, "..."],
    target: Target | str,
    *,
    reference: Reference | None = None,
    teacher_logits: Float[Tensor, "... vocab"] | None = None,
    teacher: Reference | FrozenHead | None = None,
    num_items: int | Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    return_token_losses: bool = False,
    return_report: bool = False,
    loss_weights: Float[Tensor, "..."] | None = None,
    weights_scale: WeightsScale = "all",
    label_weights: Float[Tensor, "..."] | None = None,
    sequence_ids: Int[Tensor, "..."] | None = None,
    advantages: Float[Tensor, "..."] | None = None,
    rollout: Reference | None = None,
) -> Any:
    """Loss of ``logits`` under a target, differentiable (twice) by autograd.

    Args:
        logits: ``[..., vocab]``; bfloat16 and float16 are widened to float32.
        labels: ``[...]``, already shifted; ``ignore_index`` is not trained on, whatever else stands in that row.
        target: a target, or the name of one with its default hyper-parameters.
        reference: what is known of the frozen base, aligned with ``labels``.
        teacher_logits: ``[..., vocab]`` of the teacher; or ``teacher`` for top-k with tail, or a head.
        num_items: supervised tokens of the whole optimizer batch (without those of weight 0); the default is those of
            this call.
        reduction: ``mean`` (over ``num_items``), ``sum`` or ``none`` (per token, differentiable).
        loss_weights: ``[...]`` finite factors of at least 0 on all that a token teaches (data quality): the loss is
            ``sum w_i loss_i / num_items``. Weight 0 masks a token as ``ignore_index`` does, so that it is not counted
            in ``num_items`` either; other weights do not change the count.
        weights_scale: ``all``, or ``label``: the weights multiply the pull towards the observed token alone, and a token
            of weight 0 keeps its residual and is counted.
        label_weights: ``[...]`` from ``qtarget.label_weights``, for sequence- or batch-scope targets when the batch is
            larger than this call.
        sequence_ids: ``[...]``; by default each row of two-dimensional labels is a sequence.
        advantages: ``[...]`` of samples, of either sign, for a trust region (``dppo_tv``, ``ppo_clip``, ...).
        rollout: what the policy that sampled said of each label; absent where that was the live model as it is.

    Returns:
        The loss; with ``return_token_losses`` also the detached ``[...]`` losses, with ``return_report`` also a
        ``TokenReport``, in this order.

    Raises:
        ShapeError, MissingStatisticError, IncompatibleError, HyperparameterError: see each message.

    Example:
        >>> import torch, qtarget
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[3, -100]])
        >>> qtarget.target_loss(logits, labels, "dft")  # -1/4 log 1/4
        tensor(0.3466)
    """
    if teacher_logits is not None:
        if teacher is not None:
            raise ShapeError("give teacher_logits or teacher, not both")
        if teacher_logits.shape[:-1] != labels.shape:
            raise ShapeError(
                f"teacher_logits have leading shape {tuple(teacher_logits.shape[:-1])}, labels {tuple(labels.shape)}"
            )
        teacher = Reference.from_logits(teacher_logits, labels.masked_fill(labels == ignore_index, -1))
    loss, token_losses, report = loss_from_logits(
        logits,
        labels,
        get_target(target) if isinstance(target, str) else target,
        num_items=num_items,
        reduction=reduction,
        reference=reference,
        teacher=teacher,
        sequence_ids=sequence_ids,
        loss_weights=loss_weights,
        weights_scale=weights_scale,
        label_weights=label_weights,
        advantages=advantages,
        rollout=rollout,
        ignore_index=ignore_index,
        want_report=return_report,
    )
    extra = ([token_losses] if return_token_losses else []) + ([report] if return_report else [])
    return (loss, *extra) if extra else loss


def linear_target_loss(
    hidden: Float[Tensor, "... width"],
    lm_head_weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, "..."],
    target: Target | str,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reference: Reference | FrozenHead | None = None,
    teacher: Reference | FrozenHead | None = None,
    num_items: int | Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    return_report: bool = False,
    loss_weights: Float[Tensor, "..."] | None = None,
    weights_scale: WeightsScale = "all",
    label_weights: Float[Tensor, "..."] | None = None,
    sequence_ids: Int[Tensor, "..."] | None = None,
    advantages: Float[Tensor, "..."] | None = None,
    rollout: Reference | None = None,
) -> Any:
    """The same loss from hidden states and head; never holds more than a chunk of logits.

    Gradients are computed in the forward pass, so the loss can be differentiated once, and scaled afterwards but not
    re-weighted by token. A head with ``requires_grad=False`` skips its gradient.

    Args:
        hidden: ``[..., width]`` last hidden states of the live model.
        lm_head_weight: ``[vocab, width]``; ``logits = softcap(scale (h W^T + bias))``.
        reference, teacher: known numbers, or a ``FrozenHead`` whose logits are made chunk by chunk as well.
        backend: ``chunked`` (PyTorch), ``compiled`` (the same with whole rows of logits through ``torch.compile``, for a
            live teacher and the like; its first call takes seconds), ``triton`` (the same with fused kernels, on a
            GPU), ``dense`` (holds all logits, differentiable twice: the oracle). ``auto`` takes ``triton`` where it can
            and ``chunked`` elsewhere; ``qtarget.explain_backend`` says which, and why.
        chunk_size: tokens whose logits exist at once; the default fits a memory budget.
        logits_dtype: ``torch.bfloat16`` accepts rounded logits for soft targets too, which costs 20 to 200 % of their
            gradient near the teacher; the default keeps them float32 there, and in the model's dtype for hard labels.
        vocab_group: the head is split by rows over this process group (tensor parallelism): ``lm_head_weight`` and
            ``bias`` are this rank's rows, everything else is the same on every rank.

    The other arguments, returns and errors are those of ``target_loss``; ``reduction="none"`` needs ``backend="dense"``.

    Example:
        >>> import torch, qtarget
        >>> hidden, head = torch.zeros(2, 3, requires_grad=True), torch.ones(4, 3)
        >>> loss = qtarget.linear_target_loss(hidden, head, torch.tensor([3, -100]), "dft")
        >>> loss
        tensor(0.3466, grad_fn=<DivBackward0>)
    """
    loss, report = loss_from_hidden(
        hidden,
        Head(lm_head_weight, bias, logit_scale, logit_softcap),
        labels,
        get_target(target) if isinstance(target, str) else target,
        num_items=num_items,
        reduction=reduction,
        backend=backend,
        chunk_size=chunk_size,
        logits_dtype=logits_dtype,
        vocab_group=vocab_group,
        reference=reference,
        teacher=teacher,
        sequence_ids=sequence_ids,
        loss_weights=loss_weights,
        weights_scale=weights_scale,
        label_weights=label_weights,
        advantages=advantages,
        rollout=rollout,
        ignore_index=ignore_index,
        want_report=return_report,
    )
    return (loss, report) if return_report else loss


def explain_backend(
    hidden: Float[Tensor, "... width"],
    lm_head_weight: Float[Tensor, "vocab width"],
    target: Target | str,
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reference: Reference | FrozenHead | None = None,
    teacher: Reference | FrozenHead | None = None,
    backend: Backend = "auto",
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    rollout: Reference | None = None,
) -> BackendChoice:
    """What ``linear_target_loss`` would do with these arguments, and why; computes and communicates nothing.

    With ``vocab_group`` the chunk size is told from this rank's rows; the loss takes the largest rank's.

    Raises:
        HyperparameterError: no such backend, or a chunk size, dtype, scale or soft-cap that makes no sense.
        ShapeError: the head does not fit the hidden states.
        IncompatibleError: the backend that was asked for cannot compute this loss.

    Example:
        >>> import torch, qtarget
        >>> print(qtarget.explain_backend(torch.zeros(8, 3), torch.ones(4, 3), "dft").backend)
        chunked
    """
    target = get_target(target) if isinstance(target, str) else target
    rows = hidden.reshape(-1, hidden.shape[-1])
    head = Head(lm_head_weight, bias, logit_scale, logit_softcap)
    sharded = vocab_group is not None
    return explain(backend, rows, head, target, reference, teacher, chunk_size, logits_dtype, sharded, rollout)


def label_weights(
    target: Target | str,
    label_log_probs: Float[Tensor, "..."],
    *,
    reference: Reference | None = None,
    sequence_ids: Int[Tensor, "..."] | None = None,
    mask: Tensor | None = None,
) -> Float[Tensor, "..."]:
    """Label weights of a sequence- or batch-scope target over a whole optimizer batch.

    Such a target's weights depend on all tokens at once. When the batch is split into micro-batches or ranks, compute
    them here over the union and hand each part its slice (``target_loss(..., label_weights=...)``): the gradient then
    does not depend on the split.

    Args:
        target: a target of scope ``sequence`` or ``batch`` (or a combination that starts with one).
        label_log_probs: ``[...]`` of the live model, nats (``qtarget.token_statistics``).
        reference: the frozen model's numbers, same leading shape.
        sequence_ids: ``[...]``; by default each row of a two-dimensional input is a sequence.
        mask: ``[...]`` true where the token is trained on; the default is everywhere.

    Returns:
        ``[...]`` weights, zero where masked.

    Raises:
        MissingStatisticError: the reference lacks what the target needs, or sequences cannot be told apart.
    """
    target = get_target(target) if isinstance(target, str) else target
    rule = target.weight if isinstance(target, Combined) else target
    check_frozen(reference, rule.needs.reference, target.name, "reference")
    leading = tuple(label_log_probs.shape)
    if sequence_ids is None and len(leading) == 2:
        sequence_ids = _row_ids(label_log_probs)
    kept = slice(None) if mask is None else mask.reshape(-1).nonzero()[:, 0]
    flat = label_log_probs.detach().reshape(-1)
    weights = batch_label_weights(
        target,
        flat[kept],
        None if reference is None else reference.flatten(leading).rows(kept),
        None if sequence_ids is None else sequence_ids.reshape(-1)[kept],
    )
    out = flat.new_zeros(flat.shape)
    out[kept] = weights
    return out.reshape(leading)


def _row_ids(values: Float[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    return values.new_ones(values.shape).cumsum(0).long() - 1
