"""One small ragged batch for the conformance suite, as the oracle sees it and as qtarget is handed it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import qtarget
from tests.conformance import formulas

IGNORE = -100
VOCAB = 37
WIDTH = 8


@dataclass(frozen=True)
class Batch:
    """``hidden @ weight.T`` are the live logits; ``labels`` are ragged and masked; ``frozen`` are the other model's."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    frozen: Tensor

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    @property
    def kept(self) -> Tensor:
        return self.labels != IGNORE

    def sequence_ids(self) -> Tensor:
        return torch.arange(len(self.labels))[:, None].expand_as(self.labels)

    def rows(self, index: slice) -> Batch:
        return replace(self, hidden=self.hidden[index], labels=self.labels[index], frozen=self.frozen[index])


def make_batch(batch: int = 3, time: int = 7, seed: int = 0) -> Batch:
    """Labels half likely, half random; the frozen model is the live one, moved; every sequence has its own length."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    weight = normal(VOCAB, WIDTH)
    hidden = normal(batch, time, WIDTH) * torch.linspace(0.1, 1.6, time, dtype=torch.float64)[:, None]
    logits = hidden @ weight.T
    guess = torch.randint(VOCAB, (batch, time), generator=rng)
    likely = torch.rand(batch, time, generator=rng) < 0.5
    labels = torch.where(likely, logits.argmax(-1), guess)
    for i in range(batch):
        labels[i, : 1 + i % 2] = IGNORE  # the prompt
        labels[i, time - (i * 2) % (time - 2) :] = IGNORE  # the padding
    return Batch(hidden, weight, labels, logits + 0.7 * normal(batch, time, VOCAB))


def tokens(batch: Batch, logits: Tensor) -> formulas.Tokens:
    """What the oracle sees: the supervised tokens of full ``logits``."""
    kept = batch.kept
    return formulas.Tokens(logits[kept], batch.labels[kept], batch.frozen[kept], batch.sequence_ids()[kept])


def frozen_arguments(name: str, batch: Batch) -> dict[str, Any]:
    """``reference=`` or ``teacher=`` as the method needs it, with no more in it than that."""
    if name not in formulas.FROZEN:
        return {}
    role, kind = formulas.FROZEN[name]
    full = qtarget.Reference.from_logits(batch.frozen, batch.labels)
    if kind == "label":
        return {role: qtarget.Reference(label_log_probs=full.label_log_probs)}
    return {role: with_counted(name, full, batch.labels)}


def with_counted(name: str, known: qtarget.Reference, labels: Tensor) -> qtarget.Reference:
    """With what the other rows say of each label, in the dtype of the log-probs, for the methods that ask."""
    if name not in formulas.COUNTED:
        return known
    assert known.label_log_probs is not None
    agreement = formulas.agreement(labels).to(known.label_log_probs)

    def everywhere(value: float) -> Tensor:
        return torch.full_like(agreement, value)

    if name == "crossfit_consensus":
        shares = {"noise_tokens": everywhere(formulas.NOISE_TOKENS), "noise_rows": everywhere(formulas.NOISE_ROWS)}
        return replace(known, crossfit=agreement, perplexity_ratio=everywhere(formulas.RELIABILITY), **shares)
    return replace(known, agreement=agreement, reliability=everywhere(formulas.RELIABILITY))


def oracle_gradient(
    name: str, settings: dict[str, Any], batch: Batch, logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient by the logits, from the paper's formula."""
    leaf = (batch.logits if logits is None else logits).detach().clone().requires_grad_()
    loss = formulas.losses(name, tokens(batch, leaf), settings).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient
