"""A language-model head and its three matrix products, in the dtype and layout that the device multiplies fastest."""

from __future__ import annotations

import functools
import math
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch

from qtarget.core.errors import HyperparameterError, ShapeError
from qtarget.core.shapes import Float, Tensor

BLOCK_ROWS = {"cpu": 1024}
"""Rows of the head in one product where the head is widened, or a CPU stores logits by token; 16,384 on a GPU."""


@dataclass(frozen=True)
class Head:
    """A head: ``logits = softcap(scale (h W^T + b))``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def check(self, width: int) -> Head:
        """Itself, if hidden states of this width can be multiplied with it.

        Raises:
            ShapeError: weight or bias has another shape.
            HyperparameterError: a scale or soft-cap that no model has.
        """
        if self.weight.dim() != 2 or self.weight.shape[1] != width:
            raise ShapeError(
                f"hidden states have width {width}, lm_head_weight {tuple(self.weight.shape)}; expected [vocab, width]"
            )
        if self.bias is not None and tuple(self.bias.shape) != (self.vocab,):
            raise ShapeError(
                f"bias has shape {tuple(self.bias.shape)}; expected ({self.vocab},), one a row of the head"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise HyperparameterError(f"logit_softcap={self.softcap}; expected a positive cap, or None for no cap")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise HyperparameterError(f"logit_scale={self.scale}; expected a finite factor other than 0")
        return self

    @property
    def vocab(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]

    @property
    def plain(self) -> bool:
        """Whether logits are the product (and bias) as it is."""
        return self.scale == 1.0 and self.softcap is None

    def chain(self, logits: Tensor) -> Tensor | float:
        """Derivative of a logit by ``h W^T + b``, from the logit itself."""
        # tanh' = 1 - tanh**2, and tanh is the logit over the cap: what the cap was applied to is not kept
        return self.scale if self.softcap is None else self.scale * (1 - (logits / self.softcap) ** 2)

    def detach(self) -> Head:
        """The same head without a graph."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


def blocks(weight: Tensor) -> Iterator[slice]:
    """The rows of a head, a block at a time."""
    step = BLOCK_ROWS.get(weight.device.type, 16384)
    return (slice(start, start + step) for start in range(0, len(weight), step))


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left right``, not rounded below ``dtype`` where the device can do that (a CPU rounds to the inputs' dtype)."""
    if left.dtype != dtype and left.device.type == "cuda":
        # only CUDA has products whose result is wider than their inputs
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right)


def long_product(
    left: Float[Tensor, "tokens vocab"], right: Float[Tensor, "vocab width"]
) -> Float[Tensor, "tokens width"]:
    """``left right``; on two CPU threads each half of the vocabulary is a product of its own.

    Each thread then reads half of the head. In one product both read all of it, which takes up to a sixth longer where
    tokens are few. (Not measured with more threads.)
    """
    if left.device.type != "cpu" or left.dtype.itemsize < 4 or torch.get_num_threads() != 2:
        return torch.mm(left, right)
    # bmm wants halves of one length; an odd last row is added by itself
    half = len(right) // 2
    lefts = left[:, : 2 * half].unflatten(1, (2, half)).movedim(1, 0)
    out = torch.bmm(lefts, right[: 2 * half].unflatten(0, (2, half))).sum(0)
    return out.addmm_(left[:, -1:], right[-1:]) if len(right) % 2 else out


class _Operands:
    """The process-wide setting that ``bfloat16_operands`` changes, and how many threads are inside it."""

    lock = threading.Lock()
    inside = 0
    before = ""


@contextmanager
def bfloat16_operands() -> Iterator[None]:
    """Float32 products on a CPU whose operands are bfloat16 numbers, widened: its bfloat16 instructions are exact there.

    The setting is the process's, not the thread's: the first thread in notes what it was, the last one out restores it.
    """
    if not multiplies_bfloat16("cpu"):
        yield
        return
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    with _Operands.lock:
        if not _Operands.inside:
            _Operands.before = settings.fp32_precision
            settings.fp32_precision = "bf16"
        _Operands.inside += 1
    try:
        yield
    finally:
        with _Operands.lock:
            _Operands.inside -= 1
            if not _Operands.inside:
                settings.fp32_precision = _Operands.before


@functools.cache
def multiplies_bfloat16(device_type: str) -> bool:
    """Whether the device has bfloat16 matrix instructions (a CPU without them is about five times slower than in float32)."""
    if device_type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Precision:
    """In what the products run.

    Attributes:
        inputs: dtype in which hidden states and head enter (autocast's, or the hidden states').
        multiply: dtype of the two products of the backward pass.
        logits: dtype in which logits are stored.
    """

    inputs: torch.dtype
    multiply: torch.dtype
    logits: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, soft: bool, logits_dtype: torch.dtype | None = None) -> Precision:
        """The choice for these hidden states and this head.

        Hard labels lose 0.3 % of their gradient to bfloat16 logits, as plain cross entropy does. A soft target or an
        anchor loses 20 to 200 % near agreement, so its logits are float32 products of the inputs as they are (also
        under autocast), unless ``logits_dtype`` says otherwise.

        Raises:
            HyperparameterError: logits in a dtype that is neither float32 nor that of the products.
        """
        kind = hidden.device.type
        # autocast leaves float64 as it is, and so do we
        casts = kind != "meta" and hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind)
        narrow = torch.get_autocast_dtype(kind) if casts else hidden.dtype
        if logits_dtype not in (None, narrow, torch.float32):
            raise HyperparameterError(
                f"logits_dtype={logits_dtype}; expected "
                + (
                    "torch.float32"
                    if narrow == torch.float32
                    else f"torch.float32, or {narrow} as the head is multiplied"
                )
            )
        if narrow.itemsize >= 4:
            return cls(narrow, narrow, narrow)
        fast = multiplies_bfloat16(kind) if narrow == torch.bfloat16 else kind != "cpu"
        multiply = narrow if fast else torch.float32
        exact = soft if logits_dtype is None else logits_dtype.itemsize >= 4
        inputs = torch.promote_types(hidden.dtype, weight.dtype) if exact else narrow
        return cls(inputs, multiply, torch.float32 if exact else multiply)


@dataclass(frozen=True)
class LogitGradient:
    """Gradient of a chunk by its logits: ``values + level``.

    Attributes:
        values: ``[tokens, vocab]``.
        level: ``[tokens]``, the same for the whole vocabulary, or zero: of rank one, so that it costs no pass.
    """

    values: Float[Tensor, "tokens vocab"]
    level: Tensor | None = None

    def column_sum(self, dtype: torch.dtype) -> Float[Tensor, " vocab"]:
        """Sum over tokens: the gradient by the head's bias."""
        total = self.values.sum(0, dtype=dtype)
        return total if self.level is None else total.add_(self.level.sum())


class HeadProducts:
    """Logits of one chunk at a time, in one buffer, and the sums of their gradients.

    On a CPU the buffer is ``[vocab, tokens]`` and handed out transposed: with few tokens, ``W h^T`` runs at full speed
    where ``h W^T`` loses up to 40 %.

    Args:
        head: detached.
        precision: see ``Precision``.
        chunk_size: the most tokens a chunk will have.
        by_vocabulary: whether a CPU may do so; whole-row autograd and the Triton kernels want a token's logits side by
            side.
    """

    def __init__(self, head: Head, precision: Precision, chunk_size: int, by_vocabulary: bool) -> None:
        self.head, self.precision, self.chunk_size = head, precision, chunk_size
        self.by_vocabulary = by_vocabulary and head.weight.device.type == "cpu"
        self._buffer: Tensor | None = None

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of one chunk; they live until the next call."""
        head, dtype = self.head, self.precision.logits
        hidden = hidden.to(self.precision.inputs)
        if dtype != hidden.dtype and hidden.device.type == "cuda":
            out = product(hidden, head.weight.to(hidden.dtype).T, dtype)
        else:
            out, narrow = self._room(len(hidden)), hidden.dtype == torch.bfloat16
            hidden, cut = hidden.to(dtype), hidden.device.type == "cpu" and not self.by_vocabulary
            with bfloat16_operands() if narrow and dtype == torch.float32 else nullcontext():
                for rows, weight in self._weight_blocks(dtype, cut):
                    if self.by_vocabulary:
                        torch.mm(weight, hidden.T, out=out.T[rows])
                    else:
                        torch.mm(hidden, weight.T, out=out[:, rows])
        if head.bias is not None:
            out += head.bias.to(dtype)
        if head.scale != 1.0:
            out *= head.scale
        if head.softcap is not None:
            out.div_(head.softcap).tanh_().mul_(head.softcap)
        return out

    @functools.cached_property
    def row_sum(self) -> Float[Tensor, " width"]:
        """Sum of the head's rows, ``W^T 1``, float32 at least."""
        weight = self.head.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        # rounded as the head is in the products: this stands for the sum of logits that were made
        return torch.stack([weight[rows].to(self.precision.inputs).to(wide).sum(0) for rows in blocks(weight)]).sum(0)

    def logit_sum(
        self, hidden: Float[Tensor, "tokens width"], logits: Float[Tensor, "tokens vocab"]
    ) -> Float[Tensor, " tokens"]:
        """Sum of each token's logits; without a soft-cap from the sum of the head's rows."""
        if self.head.softcap is not None:
            return logits.sum(-1, dtype=self.row_sum.dtype)
        plain = hidden.to(self.precision.inputs).to(self.row_sum.dtype) @ self.row_sum
        return self.head.scale * (plain if self.head.bias is None else plain + self.head.bias.to(plain.dtype).sum())

    def _room(self, tokens: int) -> Float[Tensor, "tokens vocab"]:
        """The buffer, for so many tokens."""
        head = self.head
        if self._buffer is None:
            size = self.chunk_size * head.vocab
            self._buffer = torch.empty(size, dtype=self.precision.logits, device=head.weight.device)
        # cut from a flat buffer, so that a shorter last chunk is contiguous in either layout
        out = self._buffer[: tokens * head.vocab]
        return out.view(head.vocab, -1).T if self.by_vocabulary else out.view(-1, head.vocab)

    def _weight_blocks(self, dtype: torch.dtype, cut: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """The head in ``dtype``: whole where it is stored so, else (or with ``cut``) a block of rows at a time."""
        weight, inputs = self.head.weight, self.precision.inputs
        if weight.dtype == dtype == inputs and not cut:
            yield slice(0, len(weight)), weight
            return
        for rows in blocks(weight):
            yield rows, weight[rows].to(inputs).to(dtype)

    def hidden_gradient(self, gradient: LogitGradient) -> Float[Tensor, "tokens width"]:
        """``G W``."""
        dtype = self.precision.multiply
        wide = torch.promote_types(dtype, torch.float32)
        out: Tensor | None = None
        for rows, weight in self._weight_blocks(dtype):
            part = gradient.values[:, rows].to(dtype)
            if out is None:
                out = long_product(part, weight)
            elif dtype == wide:
                out.addmm_(part, weight)
            else:
                # blocks are summed in float32, or each one would round the sum to bfloat16 again
                out = out.to(wide).add_(torch.mm(part, weight))
        assert out is not None
        if gradient.level is not None:
            out = out.to(wide).addmm_(gradient.level[:, None], self.row_sum[None])
        return out

    def add_weight_gradient(
        self, total: Float[Tensor, "vocab width"], gradient: LogitGradient, hidden: Float[Tensor, "tokens width"]
    ) -> None:
        """``total += G^T h``, but for the level; ``total`` is float32 at least."""
        dtype = self.precision.multiply
        hidden = hidden.to(self.precision.inputs).to(dtype)
        if dtype == total.dtype:
            total.addmm_(gradient.values.to(dtype).T, hidden)
            return
        room = torch.empty_like(total[: next(blocks(total)).stop])
        for rows in blocks(total):
            part = product(gradient.values[:, rows].to(dtype).T, hidden, total.dtype)
            if part.dtype != total.dtype:  # a CPU adds two dtypes ten times slower than it converts one
                part = room[: len(part)].copy_(part)
            total[rows] += part
