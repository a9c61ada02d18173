"""Which backend computes a loss, and why: chosen in one place, told by ``explain_backend``, never changed silently."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from qtarget.core.errors import HyperparameterError, IncompatibleError
from qtarget.core.shapes import Tensor
from qtarget.core.statistics import check_frozen, check_sampled
from qtarget.core.types import FrozenHead, Reference, Target
from qtarget.loss.chunked import Plan, whole_vocabulary
from qtarget.loss.head import Head, Precision
from qtarget.loss.result import LossRequest
from qtarget.loss.whole_rows import compile_obstacle

Backend = Literal["auto", "chunked", "compiled", "triton", "dense"]


@dataclass(frozen=True)
class BackendChoice:
    """The backend of a loss and the reasons for it; ``print`` it.

    Attributes:
        backend: ``chunked`` (PyTorch, any device), ``compiled`` (chunked, with whole rows through ``torch.compile``),
            ``triton`` (chunked, with fused kernels) or ``dense`` (the oracle).
        reasons: one sentence each.
        chunk_size: tokens whose logits exist at once; absent for ``dense``.
        logits_dtype, multiply_dtype: in what logits are stored, and the backward products run.
    """

    backend: str
    reasons: tuple[str, ...]
    chunk_size: int | None
    logits_dtype: torch.dtype
    multiply_dtype: torch.dtype

    def __str__(self) -> str:
        size = "all logits at once" if self.chunk_size is None else f"{self.chunk_size} tokens a chunk"
        dtypes = f"logits in {self.logits_dtype}, backward products in {self.multiply_dtype}"
        return f"{self.backend}: {size}, {dtypes}\n" + "\n".join(f"- {reason}" for reason in self.reasons)


def triton_obstacle(hidden: Tensor, whole: str) -> str:
    """Why the Triton kernels cannot serve; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (`pip install triton`)"
    if hidden.dtype == torch.float64:
        return "the Triton kernels have no float64"
    if whole:
        return f"{whole}, and the Triton kernels see a few columns and sums"
    if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a GPU, and the hidden states are on {hidden.device.type}"
    return ""


def choose(
    backend: Backend,
    hidden: Tensor,
    request: LossRequest,
    sharded: bool = False,
) -> tuple[str, tuple[str, ...]]:
    """The backend's name and the reasons for it.

    Raises:
        HyperparameterError: no such backend.
        IncompatibleError: the backend that was asked for cannot compute this loss.
    """
    if backend not in get_args(Backend):
        raise HyperparameterError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Backend))}")
    whole = whole_vocabulary(request)
    if sharded and (whole or backend == "dense"):
        raise IncompatibleError(
            f"a head split over vocab_group cannot compute this loss: {whole or 'the dense backend needs all logits'}; use "
            "top-k numbers of the frozen model (tail_policy 'bucket' or 'renormalize'), or gather the head"
        )
    path = (
        f"whole rows of logits are differentiated by autograd, a few tokens at a time: {whole}; backend='compiled' fuses "
        "them, after seconds of compiling"
        if whole
        else "two passes over each chunk of logits: the target sees the vocabulary through a few columns and sums"
    )
    if backend == "dense":
        return "dense", ("asked for; holds all logits, and is differentiable twice",)
    if backend == "chunked":
        return "chunked", ("asked for", path)
    if backend == "compiled":
        if (
            obstacle := compile_obstacle(hidden.device.type)
            if whole
            else "a few columns and sums leave nothing to compile"
        ):
            raise IncompatibleError(f"backend='compiled' cannot compute this loss: {obstacle}; use backend='auto'")
        return "compiled", ("asked for", f"whole rows of logits are differentiated by compiled autograd: {whole}")
    if backend == "auto" and hidden.device.type != "cuda":
        return "chunked", (f"the hidden states are on {hidden.device.type}", path)
    obstacle = triton_obstacle(hidden, whole)
    if backend == "auto":
        chosen = "the hidden states are on a GPU, and Triton is installed"
        return ("chunked", (obstacle, path)) if obstacle else ("triton", (chosen, path))
    if obstacle:
        raise IncompatibleError(f"backend='triton' cannot compute this loss: {obstacle}; use backend='auto'")
    return "triton", ("asked for", path)


def plan_of(
    name: str, hidden: Tensor, head: Head, request: LossRequest, chunk_size, logits_dtype, widest: int | None = None
) -> Plan:
    """The chunked plan behind ``chunked``, ``compiled`` or ``triton``."""
    if name == "triton":
        # only here: Triton need not be installed
        from qtarget.loss.kernels import triton as kernels
    else:
        from qtarget.loss.kernels import pytorch as kernels
    return Plan.of(hidden, head, request, chunk_size, logits_dtype, kernels, widest, name == "compiled")


def precision_reason(precision: Precision, hidden: Tensor, soft: bool, logits_dtype: torch.dtype | None) -> str:
    """Why the logits have their dtype."""
    if hidden.dtype.itemsize >= 4 and precision.multiply == hidden.dtype:
        return "everything in the dtype of the hidden states"
    if precision.multiply == torch.float32 and hidden.device.type == "cpu":
        moot = "" if logits_dtype in (None, torch.float32) else f"; logits_dtype={logits_dtype} changes nothing here"
        return (
            f"this CPU has no fast {hidden.dtype} products, so blocks of the head are widened: faster, and exact{moot}"
        )
    if precision.logits.itemsize >= 4:
        return "a soft target or an anchor is compared with the model: rounded logits would lose most of its gradient"
    return (
        "hard labels, or rounded logits were accepted" if not soft else "rounded logits were accepted by logits_dtype"
    )


def explain(
    backend: Backend,
    hidden: Tensor,
    head: Head,
    target: Target,
    reference: Reference | FrozenHead | None,
    teacher: Reference | FrozenHead | None,
    chunk_size: int | None,
    logits_dtype: torch.dtype | None,
    sharded: bool,
    rollout: Reference | None = None,
) -> BackendChoice:
    """See ``qtarget.explain_backend``."""
    head.check(hidden.shape[-1])
    check_frozen(reference, target.needs.reference, target.name, "reference")
    check_frozen(teacher, target.needs.teacher, target.name, "teacher")
    check_sampled(target, reference, "reference")
    check_sampled(target, teacher, "teacher")
    # nothing is computed: the choice depends on shapes, dtypes and the target alone
    no_labels = torch.empty(0, dtype=torch.long, device=hidden.device)
    request = LossRequest(target, no_labels, reference, teacher, rollout)
    name, reasons = choose(backend, hidden, request, sharded)
    plan = plan_of(name, hidden, head, request, chunk_size, logits_dtype)
    if name == "dense":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if wide != hidden.dtype and not target.needs.soft:
            reasons += (f"hard labels: the product is rounded to {hidden.dtype}, then widened",)
        return BackendChoice(name, reasons, None, wide, hidden.dtype)
    reasons += (precision_reason(plan.precision, hidden, target.needs.soft, logits_dtype),)
    return BackendChoice(name, reasons, plan.chunk_size, plan.precision.logits, plan.precision.multiply)
