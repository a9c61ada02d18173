"""From a target to the gradient of its loss by the logits, without knowing the target.

Autograd differentiates the target on its small tensors (one coefficient for each statistic); one row operation turns
coefficients into the gradient:

| statistic | derivative by logit j |
|---|---|
| ``log p_k`` | ``[j = k] - p_j`` |
| ``log s``, ``s`` the mass outside some ids | ``p_j [j outside] / s - p_j`` |
| entropy ``H`` | ``-p_j (log p_j + H)`` |
| mean log-prob | ``1/V - p_j`` |
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from qtarget.core.outcomes import align, outside
from qtarget.core.shapes import Bool, Float, Int, Tensor
from qtarget.core.statistics import entropy_of
from qtarget.core.types import Outcomes, Reference, Target, Terms, TokenView, WeightsScale

LEAVES = ("label_log_probs", "entropy", "mean_log_prob", "log_probs", "on_reference", "on_teacher")


def savable(view: TokenView) -> TokenView:
    """The same view in tensors that autograd may save: those made under ``torch.inference_mode`` are copied."""
    if torch.compiler.is_compiling() or not view.label_log_probs.is_inference():
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
    # label and residual term are differentiated one after the other and may share a graph
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def logit_gradient(
    log_probs: Float[Tensor, "tokens vocab"],
    labels: Int[Tensor, " tokens"],
    weights: dict[str, Tensor],
    reference: Reference | None = None,
    teacher: Reference | None = None,
) -> Float[Tensor, "tokens vocab"]:
    """Gradient by the logits of a loss with these coefficients: the table at the top of this file, summed."""
    probs = log_probs.exp()
    on_p = torch.zeros_like(log_probs[:, 0])  # everything that multiplies p alone
    gradient = torch.zeros_like(log_probs)
    if (c := weights.get("label_log_probs")) is not None:
        gradient.scatter_add_(-1, labels[:, None], c[:, None])
        on_p -= c
    if (c := weights.get("mean_log_prob")) is not None:
        gradient += (c / log_probs.shape[-1])[:, None]
        on_p -= c
    if (c := weights.get("log_probs")) is not None:
        gradient += c
        on_p -= c.sum(-1)
    if (c := weights.get("entropy")) is not None:
        # a banned token has p = 0, and 0 times minus infinity is NaN
        finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
        gradient -= c[:, None] * probs * (finite + entropy_of(log_probs)[:, None])
    for name, frozen in (("on_reference", reference), ("on_teacher", teacher)):
        if (c := weights.get(name)) is not None:
            assert frozen is not None
            at = align(frozen, log_probs)
            if at.ids is None or at.listed is None:
                gradient += c
                on_p -= c.sum(-1)
            else:
                on_p -= scatter_outcomes(gradient, log_probs, c, at.ids, at.listed)
    return gradient.addcmul_(probs, on_p[:, None])


def scatter_outcomes(
    gradient: Float[Tensor, "tokens vocab"],
    log_probs: Float[Tensor, "tokens vocab"],
    c: Float[Tensor, "tokens k_1"],
    ids: Int[Tensor, "tokens k"],
    listed: Bool[Tensor, "tokens k"],
) -> Float[Tensor, " tokens"]:
    """Add the coefficients of k listed log-probs and the tail to ``gradient``; return what they take from ``p``."""
    c = c.masked_fill(torch.cat([~listed, torch.zeros_like(listed[:, :1])], dim=-1), 0.0)
    gradient.scatter_add_(-1, ids, c[:, :-1])
    rest = outside(log_probs, ids, listed)
    empty = (rest == -torch.inf).all(-1)
    tail = c[:, -1].masked_fill(empty, 0.0)
    # softmax over what is outside gives p_j / s; of nothing it would be NaN
    gradient += tail[:, None] * torch.where(empty[:, None], 0.0, rest).softmax(-1)
    return c[:, :-1].sum(-1) + tail


@dataclass(frozen=True)
class Differentiated:
    """A target's terms (detached) and their coefficients, statistic by statistic."""

    terms: Terms
    label: dict[str, Tensor]
    residual: dict[str, Tensor]

    def combined(self, loss_weights: Tensor | None, weights_scale: WeightsScale = "all") -> dict[str, Tensor]:
        """Coefficients of ``Terms.total`` with these weights."""
        weighted = _times(self.label, loss_weights)
        for name, c in _times(self.residual, loss_weights if weights_scale == "all" else None).items():
            weighted[name] = weighted[name] + c if name in weighted else c
        return weighted

    def pulls(self, loss_weights: Tensor | None, weights_scale: WeightsScale = "all") -> tuple[Tensor, Tensor]:
        """``a`` and ``b`` of each token: minus the sum of the log-probs' coefficients, label term and residual term.

        A pull of negative weight (gem's) comes out negative; entropy pulls towards nothing and is left out.
        """
        zero = torch.zeros_like(next(v for v in (self.terms.label, self.terms.residual) if v is not None))
        label, residual = (
            sum((-(c if c.dim() == 1 else c.sum(-1)) for n, c in part.items() if n != "entropy"), zero)
            for part in (self.label, self.residual)
        )
        if loss_weights is None:
            return label, residual
        return label * loss_weights, residual * loss_weights if weights_scale == "all" else residual


def _times(part: dict[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    if weights is None:
        return dict(part)
    return {name: c * (weights if c.dim() == 1 else weights[:, None]) for name, c in part.items()}


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
