"""The gradients of a summed loss by hidden states and head, added up chunk by chunk and handed out once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qtarget.core.shapes import Float, Int, Tensor
from qtarget.loss.head import Head, HeadProducts, LogitGradient, blocks
from qtarget.loss.vocabulary import Vocabulary


@dataclass
class Gradients:
    """Running gradients of the summed loss; the head's are float32 at least, whatever the model's dtype.

    Attributes:
        hidden: ``[all tokens, width]``, zero where masked.
        weight, bias: like the head's.
        every_row: ``[width]``, to be added to each row of ``weight``.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    every_row: Tensor | None = None

    @classmethod
    def empty(cls, hidden: Tensor, head: Head, needs_grad: tuple[bool, bool, bool]) -> Gradients:
        """Buffers for the inputs that require a gradient."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return cls(
            torch.zeros_like(hidden) if needs_grad[0] else None,
            torch.zeros_like(head.weight, dtype=wide) if needs_grad[1] else None,
            torch.zeros_like(head.bias, dtype=wide) if needs_grad[2] and head.bias is not None else None,
        )

    def add(
        self,
        index: Int[Tensor, " chunk"] | slice,
        gradient: LogitGradient,
        hidden: Float[Tensor, "tokens width"],
        products: HeadProducts,
        vocabulary: Vocabulary,
    ) -> None:
        """Add one chunk, given its gradient by ``h W^T + b``."""
        if self.bias is not None:
            self.bias += gradient.column_sum(self.bias.dtype)
        if self.hidden is not None:
            self.hidden[index] = vocabulary.total(products.hidden_gradient(gradient)).to(self.hidden.dtype)
        if self.weight is not None:
            products.add_weight_gradient(self.weight, gradient, hidden)
            if gradient.level is not None:
                row = gradient.level.to(self.weight.dtype) @ hidden.to(self.weight.dtype)
                self.every_row = row if self.every_row is None else self.every_row + row

    def finish(self) -> None:
        """Add what all rows of the head share."""
        # once, and not a pass over the head's gradient for every chunk
        if self.weight is not None and self.every_row is not None:
            self.weight += self.every_row

    def hand_out(self, upstream: Float[Tensor, ""], dtypes: tuple[Any, Any, Any], keep: bool) -> list[Tensor | None]:
        """Scaled by the upstream gradient, in place unless they must be kept for another backward pass."""
        values = (self.hidden, self.weight, self.bias)
        scaled = [
            None if v is None else scale_to(v, upstream, dtype, keep) for v, dtype in zip(values, dtypes, strict=True)
        ]
        if not keep:
            self.hidden = self.weight = self.bias = None
        return scaled


def scale_to(value: Tensor, factor: Float[Tensor, ""], dtype: torch.dtype, keep: bool) -> Tensor:
    """``factor value`` in a dtype; in place where it is that of the value and the value need not be kept."""
    if value.dtype == dtype:
        return value * factor if keep else value.mul_(factor)
    out = torch.empty_like(value, dtype=dtype)
    for block in blocks(value):  # while it is in the cache
        out[block] = value[block] * factor
    return out
