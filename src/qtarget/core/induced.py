"""What does a loss teach? ``Q = p - g`` of any differentiable loss, and its ``(a, b)`` view where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtarget.core.errors import LossUnderLensError, ShapeError
from qtarget.core.shapes import Bool, Float, Int, Tensor

FIT_TOLERANCE = 1e-5
"""Relative error of the gradient below which a loss counts as being of the form ``(a+b) p - a d_y - b q``."""


@dataclass(frozen=True)
class InducedTarget:
    """The distribution that a loss pulls each token towards.

    Attributes:
        probs: ``[tokens, vocab]`` the model's own ``p``.
        gradient: ``[tokens, vocab]`` of each token's loss by its logits.
        target: ``[tokens, vocab]`` ``Q = p - g``; leaves the simplex where the loss pushes too hard.
        label_weight: ``[tokens]`` ``a`` of the closest ``g = (a+b) p - a d_y - b q``.
        residual_weight: ``[tokens]`` ``b`` of the same.
        fits: ``[tokens]`` whether that form reproduces the gradient; if not, ``a`` and ``b`` mean nothing.
    """

    probs: Float[Tensor, "tokens vocab"]
    gradient: Float[Tensor, "tokens vocab"]
    target: Float[Tensor, "tokens vocab"]
    label_weight: Float[Tensor, " tokens"]
    residual_weight: Float[Tensor, " tokens"]
    fits: Bool[Tensor, " tokens"]

    @property
    def in_simplex(self) -> Bool[Tensor, " tokens"]:
        """Whether ``Q`` is a distribution: nothing negative, sum one."""
        tolerance = 1e-6
        return (self.target >= -tolerance).all(-1) & ((self.target.sum(-1) - 1).abs() < tolerance)


def induced_target(
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    logits: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    *,
    residual: Float[Tensor, "tokens vocab"] | None = None,
) -> InducedTarget:
    """Differentiate ``loss_fn(logits, labels)`` one token at a time and read off what it teaches.

    One token at a time, so a mean over the batch does not scale the answer.

    Args:
        loss_fn: any callable of ``([1, vocab] logits, [1] labels)`` to a loss; its result is summed.
        logits: ``[tokens, vocab]``; computed in float64.
        labels: ``[tokens]``.
        residual: ``[tokens, vocab]`` the distribution ``q`` to look for; uniform by default.

    Raises:
        ShapeError: logits and labels do not line up, a label is masked or outside the vocabulary, or the loss does not
            depend on the logits.
        LossUnderLensError: the loss returned something else than a tensor.

    Example:
        >>> import torch, qtarget
        >>> logits, labels = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])
        >>> smoothed = lambda z, y: torch.nn.functional.cross_entropy(z, y, label_smoothing=0.3)
        >>> seen = qtarget.induced_target(smoothed, logits, labels)
        >>> [round(float(v), 4) for v in (*seen.target[0], seen.label_weight, seen.residual_weight)]
        [0.8, 0.1, 0.1, 0.7, 0.3]

    Reference: arXiv 2606.11189 (the induced target). Deviations: the ``(a, b)`` fit is ours.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"expected logits [tokens, vocab] and labels [tokens], got {tuple(logits.shape)} and {tuple(labels.shape)}; "
            "flatten a batch first, and drop masked tokens: keep = labels != -100; logits[keep], labels[keep]"
        )
    outside = (labels < 0) | (labels >= logits.shape[-1])
    if bool(outside.any()):
        raise ShapeError(
            f"label {int(labels[outside][0])} is not in the vocabulary of {logits.shape[-1]}: a masked token is taught nothing; "
            "drop such tokens: keep = labels != -100; logits[keep], labels[keep]"
        )
    logits = logits.detach().double()
    gradient = torch.stack([_token_gradient(loss_fn, z, y) for z, y in zip(logits, labels, strict=True)])
    probs = logits.softmax(-1)
    q = torch.full_like(probs, 1 / probs.shape[-1]) if residual is None else residual.double()
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1]).double()
    a, b, fits = fit_pulls(gradient, probs, one_hot, q)
    return InducedTarget(probs, gradient, probs - gradient, a, b, fits)


def _token_gradient(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, label: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = logits[None].clone().requires_grad_()
        loss = loss_fn(leaf.clone(), label[None].clone())  # copies: a loss may write into its arguments
        if not isinstance(loss, Tensor):
            raise LossUnderLensError(
                f"the loss returned {type(loss).__name__}; expected a tensor, so no `.item()` and no dictionary"
            )
        if not loss.requires_grad:
            raise ShapeError(
                "the loss does not depend on the logits; expected a differentiable callable of (logits, labels)"
            )
        return torch.autograd.grad(loss.sum(), leaf)[0][0]


def fit_pulls(
    gradient: Tensor, probs: Tensor, one_hot: Tensor, q: Tensor, tolerance: float = FIT_TOLERANCE
) -> tuple[Tensor, Tensor, Tensor]:
    """Least-squares ``a`` and ``b`` in ``g = a (p - d_y) + b (p - q)``; ``b = 0`` when ``a`` alone explains it."""
    to_label, to_residual = probs - one_hot, probs - q
    scale = gradient.norm(dim=-1)
    # clamped for a model that is certain of the label: p = d_y leaves 0 / 0
    alone = (gradient * to_label).sum(-1) / (to_label * to_label).sum(-1).clamp(min=1e-300)
    explained = (gradient - alone[:, None] * to_label).norm(dim=-1) <= tolerance * scale
    # columns are dependent where q = p or p = d_y: gelsd (SVD) solves that too, and CUDA has gels alone
    basis = torch.stack([to_label, to_residual], dim=-1)
    both = torch.linalg.lstsq(
        basis, gradient[..., None], driver="gelsd" if basis.device.type == "cpu" else None
    ).solution[..., 0]
    a = torch.where(explained, alone, both[:, 0])
    b = torch.where(explained, 0.0, both[:, 1])
    rest = gradient - a[:, None] * to_label - b[:, None] * to_residual
    # clamped: a gradient that is zero but for rounding fits
    return a, b, rest.norm(dim=-1) <= tolerance * scale.clamp(min=1e-12)
