"""The same loss from hidden states, a chunk of logits at a time, with the gradient computed in the forward pass.

The loss is a sum over tokens, so an upstream gradient only scales it: each chunk's logits are turned into their
gradient at once and multiplied back onto the hidden states and the head. Nothing of vocabulary size outlives a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qtarget.coefficients import differentiate, logit_gradient
from qtarget.loss.result import LossRequest, TokenReport, report
from qtarget.shapes import Float, Tensor
from qtarget.types import project

LOGIT_BYTES = 64 * 2**20
"""Memory one chunk of float32 logits may take; chunks below 128 tokens starve the matrix products."""


@dataclass(frozen=True)
class Head:
    """The live model's head: ``logits = softcap(scale (h W^T + b))``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "tokens width"], exact: bool) -> Float[Tensor, "tokens vocab"]:
        """Logits of one chunk, at least float32."""
        return project(hidden, self.weight, self.bias, self.scale, self.softcap, exact=exact)

    def backward(self, gradient: Tensor, logits: Tensor) -> Float[Tensor, "tokens vocab"]:
        """From the gradient by the logits to that by ``h W^T + b``."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap) ** 2)
        return gradient if self.scale == 1.0 else gradient * self.scale


def default_chunk_size(vocab: int) -> int:
    """Tokens a chunk: what fits the logit budget, at least 128."""
    return max(128, LOGIT_BYTES // (4 * vocab))


@dataclass
class Gradients:
    """Running gradients of the summed loss; the head's are accumulated in float32 whatever the model's dtype."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, hidden: Tensor, head: Head, needs_grad: tuple[bool, bool, bool]) -> Gradients:
        """Buffers for the inputs that require a gradient."""
        wide = torch.promote_types(hidden.dtype, torch.float32)

        def like(tensor: Tensor | None, wanted: bool) -> Tensor | None:
            return torch.zeros_like(tensor, dtype=wide) if wanted and tensor is not None else None

        return cls(
            torch.zeros_like(hidden) if needs_grad[0] else None,
            like(head.weight, needs_grad[1]),
            like(head.bias, needs_grad[2]),
        )

    def add(self, index: slice, gradient: Float[Tensor, "tokens vocab"], hidden: Tensor, head: Head) -> None:
        """Add one chunk, given its gradient by ``h W^T + b``."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        narrow = gradient.to(hidden.dtype)
        if self.hidden is not None:
            self.hidden[index] = narrow @ head.weight.to(hidden.dtype)
        if self.weight is not None:
            self.weight += narrow.T @ hidden[index]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, head: Head, request: LossRequest, chunk_size: int, out: list):
        grads = Gradients.zeros(hidden, head, ctx.needs_input_grad[:3])
        differentiable = any(ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, max(len(hidden), 1), chunk_size):  # an empty batch runs once: its report is empty too
            index = slice(start, start + chunk_size)
            value, gradient = _chunk(hidden[index], head, request.rows(index), differentiable, out)
            loss += value
            if gradient is not None:
                grads.add(index, gradient, hidden, head)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream):
        hidden, weight, bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        scaled = [
            None if g is None else (g * upstream[0]).to(dtype)
            for g, dtype in (
                (hidden, hidden.dtype if hidden is not None else None),
                (weight, weight_dtype),
                (bias, bias_dtype),
            )
        ]
        return (*scaled, None, None, None, None)


def _chunk(
    hidden: Tensor, head: Head, request: LossRequest, differentiable: bool, out: list[TokenReport]
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk, and its gradient by ``h W^T + b`` where one is wanted."""
    target = request.target
    logits = head.logits(hidden, exact=target.needs.soft)
    view = request.view(logits)
    if not (differentiable or request.want_report):
        return target.losses(view).total(request.loss_weights).sum(), None
    found = differentiate(target, view)
    if request.want_report:
        out.append(report(logits, view, request, found))
    loss = found.terms.total(request.loss_weights).sum()
    if not differentiable:
        return loss, None
    weights = found.combined(request.loss_weights)
    gradient = logit_gradient(logits, request.labels, weights, view.reference, view.teacher)
    return loss, head.backward(gradient, logits)


def chunked_loss_sum(
    hidden: Float[Tensor, "tokens width"], head: Head, request: LossRequest, chunk_size: int | None = None
) -> tuple[Float[Tensor, ""], TokenReport | None]:
    """Summed loss of the supervised tokens, differentiable once in hidden states, head weight and bias.

    Frozen heads (``requires_grad=False``) skip the weight gradient; where nothing requires a gradient, none is computed.
    """
    out: list[TokenReport] = []
    size = chunk_size or default_chunk_size(head.weight.shape[0])
    inputs = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():  # inside apply, parameters would still claim to need gradients
        inputs = tuple(None if value is None else value.detach() for value in inputs)
    loss = _ChunkedLoss.apply(*inputs, head, request, size, out)
    return loss, TokenReport.concatenate(out) if out else None  # pyright: ignore[reportReturnType]
