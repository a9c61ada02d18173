"""Small batches with a known answer, for the checks of the lens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.shapes import Tensor
from qtarget.report.lens.form import with_label_probs
from qtarget.report.lens.losses import IGNORE, Loss, gradient

VOCAB = 128  # over 100: a label of -100 that is not ignored then reads token 28 and raises nothing
ROWS, TIME = 8, 6


@dataclass(frozen=True)
class Batch:
    """``[rows, time]`` labels with live and frozen logits."""

    logits: Tensor
    labels: Tensor
    frozen: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.labels, self.frozen

    def part(self, rows: slice, time: slice = slice(None)) -> Batch:
        return Batch(self.logits[rows, time], self.labels[rows, time], self.frozen[rows, time])

    def masked(self, where: Tensor) -> Batch:
        return Batch(self.logits, self.labels.masked_fill(where, IGNORE), self.frozen)

    def gradient(self, loss: Loss, num_items: int | None = None) -> Tensor:
        return gradient(loss, self.logits, self.labels, self.frozen, num_items)[1]


def random_batch(
    rows: int = ROWS, time: int = TIME, seed: int = 0, label_probs: tuple[float, float] = (0.3, 0.7)
) -> Batch:
    """Random logits; ``p_y`` is high enough for thresholds, and the frozen model's probability of the label is close to it."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, time, *shape, generator=rng, dtype=torch.float64)

    logits, frozen = 1.5 * normal(VOCAB), 1.5 * normal(VOCAB)
    labels = torch.randint(VOCAB, (rows, time), generator=rng)
    low, high = label_probs
    p_y = low + (high - low) * torch.rand(rows, time, generator=rng, dtype=torch.float64)
    p_frozen = torch.sigmoid(p_y.logit() + 0.1 * normal())
    return Batch(with_label_probs(logits, labels, p_y), labels, with_label_probs(frozen, labels, p_frozen))


def copies(rows: int, time: int) -> Batch:
    """One token everywhere, so that weights made over a batch are equal and only counts matter."""
    one = random_batch(1, 1)
    logits, labels, frozen = (t.expand(rows, time, *t.shape[2:]).clone() for t in one.tensors())
    return Batch(logits, labels, frozen)


def ragged_batch() -> Batch:
    """Eight rows of one to six trained tokens, the rest masked."""
    lengths = torch.tensor([6, 1, 4, 2, 6, 3, 1, 5])
    return random_batch().masked(torch.arange(TIME)[None] >= lengths[:, None])
