"""Practices that drop rows of each batch as it comes: the tail of what was learnt most, and small-loss co-teaching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qtarget.benchmarks.finetune import (
    Encoded,
    Recipe,
    collate,
    completion_log_probs,
    hidden_states,
    of_labels,
    schedule,
)
from qtarget.benchmarks.noise.methods import Method
from qtarget.core.types import Reference

Select = Callable[[Any, list[int], int], list[int]]


def selector(
    method: Method,
    share: float,
    rows: Sequence[Encoded],
    known: Sequence[Reference],
    base: Callable[[], Any],
    recipe: Recipe,
) -> Select | None:
    """What a method does to each batch, or None.

    Args:
        share: of a batch that is dropped.
        base: gives the peer of co-teaching.
    """
    if method.selects == "tail":
        return Tail(rows, known, share)
    return Peer(rows, base(), share, recipe) if method.selects == "peer" else None


def row_losses(model: Any, rows: Sequence[Encoded]) -> np.ndarray:
    """``[rows]`` mean NLL of each row's completion, nats a token."""
    found = completion_log_probs(model, rows, batch_size=len(rows))
    return np.array([-float(of_labels(values, row).mean()) for values, row in zip(found, rows, strict=True)])


def lowest(values: np.ndarray, chosen: Sequence[int], share: float) -> list[int]:
    """Those of ``chosen`` with the lowest values, without a ``share`` of them, in their order.

    Example:
        >>> lowest(np.array([3.0, 1.0, 2.0, 9.0]), [10, 11, 12, 13], 0.25)
        [10, 11, 12]
    """
    kept = np.sort(np.argsort(values, kind="stable")[: max(1, round((1 - share) * len(chosen)))])
    return [chosen[i] for i in kept]


class Tail:
    """TailSFT's rule: of each batch the rows are dropped whose mean loss has fallen furthest below the base's."""

    def __init__(self, rows: Sequence[Encoded], known: Sequence[Reference], share: float) -> None:
        self.rows, self.share = rows, share
        self.first = np.array([-float(one.label_log_probs.mean()) for one in known])  # pyright: ignore[reportOptionalMemberAccess]

    def __call__(self, model: Any, chosen: list[int], step: int) -> list[int]:
        fallen = self.first[chosen] - row_losses(model, [self.rows[i] for i in chosen])
        return lowest(fallen, chosen, self.share)


class Peer:
    """Co-teaching: two models; each learns the rows of a batch at which the other has the smallest loss.

    The share that is dropped grows from 0 over the first third of the steps. Both begin as the same base, so the peer learns
    half of the first batch alone: else they would be one model.
    """

    def __init__(self, rows: Sequence[Encoded], peer: Any, share: float, recipe: Recipe) -> None:
        self.rows, self.peer, self.share, self.recipe = rows, peer, share, recipe
        self.optimizer = torch.optim.AdamW(peer.parameters(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        self.grown = max(1, recipe.steps // 3)

    def __call__(self, model: Any, chosen: list[int], step: int) -> list[int]:
        batch, share = [self.rows[i] for i in chosen], self.share * min(1.0, step / self.grown)
        mine = lowest(row_losses(model, batch), chosen, share)
        if step == 0:
            mine = chosen[::2]
        theirs = lowest(row_losses(self.peer, batch), chosen, share)
        self._learn([self.rows[i] for i in mine], step)
        return theirs

    def _learn(self, batch: Sequence[Encoded], step: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * schedule(step, self.recipe.steps)
        ids, labels = (tensor.to(self.peer.device) for tensor in collate(batch))
        kept = labels >= 0
        logits = hidden_states(self.peer, ids)[kept] @ self.peer.lm_head.weight.T
        torch.nn.functional.cross_entropy(logits, labels[kept]).backward()
        torch.nn.utils.clip_grad_norm_(self.peer.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
