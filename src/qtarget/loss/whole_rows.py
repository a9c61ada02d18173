"""Whole rows of logits differentiated by autograd: for a target that needs a second distribution over the vocabulary.

A few tokens at a time, so that what lies between logits and gradient stays in the cache. ``torch.compile`` can fuse the same
lines, whatever the target.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qtarget.core.coefficients import differentiate, logit_gradient
from qtarget.core.errors import IncompatibleError
from qtarget.core.shapes import Float, Tensor
from qtarget.core.statistics import entropy_of
from qtarget.core.types import Reference
from qtarget.loss.head import Head
from qtarget.loss.result import LossRequest, TokenReport, report

PIECE_BYTES = {"cpu": 2**21}
"""Logits that autograd differentiates at once; 32 MiB on a GPU, where launches cost more than the cache saves."""

Result = tuple[Float[Tensor, ""], list[TokenReport]]


def whole_rows(
    logits: Float[Tensor, "tokens vocab"], frozen: dict[str, Tensor], request: LossRequest, head: Head, write: bool
) -> Result:
    """Summed loss of these tokens, and their report where one is wanted; with ``write`` the logits become its gradient.

    Args:
        logits: of the live model.
        frozen: by role, the logits of frozen models, where they are made chunk by chunk.
        request: for these tokens.
        head: what the logits were made with; the gradient is by what its scale and soft-cap were applied to.
        write: whether a gradient is needed.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    request = replace(request, **{role: numbers_of(z, request, role) for role, z in frozen.items()})  # pyright: ignore[reportArgumentType]
    z = logits.to(wide)
    log_probs = z.log_softmax(-1)
    view = request.view(log_probs)
    if not (write or request.want_report):
        return request.target.losses(view).total(*request.weighting).sum(), []
    found = differentiate(request.target, view)
    reports = [report(z, log_probs, view, request, found)] if request.want_report else []
    if write:
        weights = found.combined(*request.weighting)
        gradient = logit_gradient(log_probs, request.labels, weights, view.reference, view.teacher)
        logits.copy_(gradient if head.plain else gradient * head.chain(z))
    return found.terms.total(*request.weighting).sum(), reports


def in_pieces(
    logits: Float[Tensor, "tokens vocab"],
    frozen: dict[str, Tensor],
    request: LossRequest,
    head: Head,
    write: bool,
    compiled: bool,
) -> Result:
    """``whole_rows``, compiled or not, a few tokens at a time."""
    fit = PIECE_BYTES.get(logits.device.type, 2**25) // (logits.dtype.itemsize * logits.shape[1])
    # torch.compile makes a size of 1 a constant and would compile it separately
    step = max(2 if compiled else 1, fit)
    loss = torch.zeros((), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    reports: list[TokenReport] = []
    for start in range(0, max(len(logits), 1), step):
        part = slice(start, start + step)
        piece, others = logits[part], {role: z[part] for role, z in frozen.items()}
        rows = fused() if compiled and len(piece) > 1 else whole_rows  # a last one alone would be compiled for itself
        value, found = rows(piece, others, request.rows(part), head, write)
        loss += value
        reports += found
    return loss, reports


def numbers_of(logits: Float[Tensor, "tokens vocab"], request: LossRequest, role: str) -> Reference:
    """What a frozen model with these logits says, as far as the target asks.

    Not ``Reference.from_logits``: that looks at the labels' values, which were checked before and which no compiler follows.
    """
    log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    at_label = log_probs.gather(-1, request.labels[:, None])[:, 0]
    entropy = entropy_of(log_probs) if "entropy" in getattr(request.target.needs, role) else None
    return Reference(label_log_probs=at_label, entropy=entropy, log_probs=log_probs)


def compile_obstacle(device_type: str) -> str:
    """Why ``fused`` cannot serve; empty if it can."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        return f"it needs torch 2.13 or later, and this is {torch.__version__}"
    if device_type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "torch.compile needs a C++ compiler on a CPU: install g++, or name one in CXX"
    return ""


@functools.cache
def fused() -> Callable[[Tensor, dict[str, Tensor], LossRequest, Head, bool], Result]:
    """``whole_rows`` through ``torch.compile``; the first call of a target compiles, which takes seconds.

    Raises:
        IncompatibleError: (by the function) it cannot be compiled here.
    """
    import torch._dynamo  # takes two seconds
    import torch.fx.experimental._config

    symbols: Any = torch.fx.experimental._config
    # fullgraph: a graph break is an error and not a slow path that nobody notices
    options: Any = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True, "recompile_limit": 256}
    compiled = torch.compile(whole_rows, **options)

    def run(logits: Tensor, frozen: dict[str, Tensor], *rest: Any) -> Result:
        try:
            # ``differentiate`` calls torch.autograd.grad inside; with duck shapes a batch where two sizes happen to be
            # equal would be compiled for itself
            with torch._dynamo.config.patch(trace_autograd_ops=True), symbols.patch(use_duck_shape=False):
                return compiled(logits, frozen, *rest)
        except Exception as error:
            whole_rows(logits.clone(), frozen, *rest)  # an error of the target's own is raised here, in its own words
            raise IncompatibleError(
                f"backend='compiled': torch.compile could not compile this loss (its reasons stand above: "
                f"{type(error).__name__}); use backend='chunked'"
            ) from error

    return run
