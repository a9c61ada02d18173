"""The two operations of ``pytorch.py`` as Triton kernels: one program a row reads the logits once, one sweep overwrites them.

Registered as custom operators with fake versions, so that ``torch.compile`` takes them as they are, and CUDA graphs after a
first call outside the capture (which tunes). Both are deterministic: a row's sums are made by one program in a fixed
order, and nothing is added atomically.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from qtarget.core.errors import IncompatibleError
from qtarget.core.shapes import Float, Tensor
from qtarget.loss.columns import RestGradient, RestSums

INTERPRETED: bool = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
"""Kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before the first import): on a CPU, slowly, for tests."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CONFIGS = [triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((4096, 8), (8192, 8), (16384, 16))]
if INTERPRETED:
    CONFIGS = CONFIGS[:1]  # nothing to tune

SWEEP = {"BLOCK": 4096, "num_warps": 8}
"""Of the gradient kernel, which only streams. It overwrites its input, so tuning it would cost a copy of the logits."""


@triton.autotune(CONFIGS, key=["vocab"])
@triton.jit
def _sums_kernel(
    logits, maximum, exp, exp_x, vocab, stride, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # one program a row
    # row x stride passes 2**31 where the caller asks for large chunks
    row = tl.program_id(0).to(tl.int64)
    # finite as ``pytorch.NOTHING``: a block may hold nothing but columns set aside
    m, s, t = -1e30, 0.0, 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + at, mask=at < vocab, other=-float("inf")).to(tl.float32)
        new = tl.maximum(m, tl.max(z, 0))
        x = z - new
        e = tl.exp(x)
        shrink = tl.exp(m - new)
        if ENTROPY:
            # sum e (z - m) moved to the new maximum; before ``s``, whose old value it needs
            t = shrink * (t + (m - new) * s) + tl.sum(e * tl.maximum(x, -1e30), 0)
        s = shrink * s + tl.sum(e, 0)
        m = new
    tl.store(maximum + row, m)
    tl.store(exp + row, s)
    if ENTROPY:
        tl.store(exp_x + row, t)


@triton.jit
def _gradient_kernel(
    logits, shift, factor, slope, level, softcap, vocab, stride,
    HAS_SLOPE: tl.constexpr, HAS_LEVEL: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    place = logits + row * stride + at
    z = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x = z - tl.load(shift + row)
    line = tl.load(factor + row)
    if HAS_SLOPE:
        line += tl.load(slope + row) * tl.maximum(x, -1e30)
    g = tl.exp(x) * line
    if HAS_LEVEL:
        g += tl.load(level + row)
    if HAS_SOFTCAP:
        capped = tl.maximum(z / softcap, -1.0)  # a column set aside is minus infinity
        g *= 1 - capped * capped
    tl.store(place, g.to(logits.dtype.element_ty), mask=inside)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


@torch.library.custom_op("qtarget::rest_sums", mutates_args=())
def _rest_sums(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    maximum, exp, exp_x = (torch.zeros(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3))
    # a grid of no programs cannot be launched
    if len(logits):
        with on_device(logits):
            flags: dict[str, Any] = {"ENTROPY": entropy}
            _sums_kernel[(len(logits),)](logits, maximum, exp, exp_x, logits.shape[1], logits.stride(0), **flags)
    return maximum, exp, exp_x


@_rest_sums.register_fake
def _(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))  # pyright: ignore[reportReturnType]


@torch.library.custom_op("qtarget::overwrite_with_gradient", mutates_args=("logits",))
def _overwrite(
    logits: Tensor, shift: Tensor, factor: Tensor, slope: Tensor | None, level: Tensor | None, softcap: float
) -> None:
    if not len(logits):
        return
    vocab = logits.shape[1]
    absent = factor  # never read
    numbers = (shift, factor, absent if slope is None else slope, absent if level is None else level)
    flags: dict[str, Any] = {
        "HAS_SLOPE": slope is not None,
        "HAS_LEVEL": level is not None,
        "HAS_SOFTCAP": softcap > 0,
        **SWEEP,
    }
    with on_device(logits):
        grid = (len(logits), triton.cdiv(vocab, SWEEP["BLOCK"]))
        _gradient_kernel[grid](logits, *numbers, softcap, vocab, logits.stride(0), **flags)


@_overwrite.register_fake
def _(logits, shift, factor, slope, level, softcap) -> None:
    return None


def check(logits: Float[Tensor, "tokens vocab"]) -> None:
    """Raise where the kernels cannot read these logits.

    Raises:
        IncompatibleError: dtype or layout.
    """
    if logits.dtype not in DTYPES or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise IncompatibleError(
            f"the Triton kernels read float32, bfloat16 or float16 logits stored row by row, not {logits.dtype} with "
            f"strides {logits.stride()}; use backend='chunked'"
        )


def rest_sums(logits: Float[Tensor, "tokens vocab"], *, entropy: bool) -> RestSums:
    """See ``pytorch.rest_sums``."""
    check(logits)
    maximum, exp, exp_x = torch.ops.qtarget.rest_sums(logits, entropy)
    return RestSums(maximum, exp, exp_x if entropy else None)


def overwrite_with_gradient(
    logits: Float[Tensor, "tokens vocab"], gradient: RestGradient, softcap: float | None = None
) -> None:
    """See ``pytorch.overwrite_with_gradient``."""
    check(logits)
    parts = (gradient.shift, gradient.factor, gradient.slope, gradient.level)
    # the kernel reads one number a row at stride 1; coefficients may come expanded
    torch.ops.qtarget.overwrite_with_gradient(
        logits, *(None if v is None else v.contiguous() for v in parts), softcap or 0.0
    )
