"""`qtarget score --crossfit` by the bare loop: copies of a base that judge the rows which they have not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch

from qtarget.benchmarks.finetune import Encoded, Recipe, completion_log_probs, fine_tune, of_labels
from qtarget.core.types import Reference
from qtarget.data.crossfit.folds import assign_folds, prompt_key
from qtarget.data.crossfit.neighbours import PROMPTS, contradiction, nearest_prompts
from qtarget.data.crossfit.witness import witness_fields
from qtarget.filtering import ScoredRows
from qtarget.registry import get_target

FOLDS = 2
FORWARD = 1 / 3
"""Of a training step, what a forward pass costs."""


@dataclass(frozen=True)
class Judged:
    """What copies say of rows that they have not seen, nats.

    Attributes:
        log_probs, entropy: of each row, ``[completion]``.
        contradiction: ``[rows]`` of ``qtarget.data.crossfit.neighbours``; None where no other prompts were tried.
    """

    log_probs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    contradiction: np.ndarray | None


def masks_of(rows: Sequence[Encoded]) -> list[list[bool]]:
    """Of each row which tokens are trained."""
    return [[False] * len(row.prompt) + [True] * len(row.completion) for row in rows]


def crossfit_of(
    rows: Sequence[Encoded], base: Callable[[], Any], recipe: Recipe, *, other_prompts: bool = True
) -> Judged:
    """For each fold a copy learns the other rows, and judges its own.

    Args:
        base: gives a new copy.
        recipe: of the copies, all of whose weights are trained.
        other_prompts: ask each answer under other prompts too, which costs a pass for each.
    """
    keys = [prompt_key(row.prompt + row.completion, mask) for row, mask in zip(rows, masks_of(rows), strict=True)]
    folds = assign_folds(keys, FOLDS, recipe.seed)
    log_probs: dict[int, torch.Tensor] = {}
    entropy: dict[int, torch.Tensor] = {}
    contradicted = np.zeros(len(rows))
    for fold in range(FOLDS):
        copy, judged = base(), np.flatnonzero(folds == fold)
        fine_tune(
            copy, [row for row, other in zip(rows, folds, strict=True) if other != fold], get_target("sft"), recipe
        )
        mine = [rows[i] for i in judged.tolist()]
        for i, values in zip(judged.tolist(), completion_log_probs(copy, mine), strict=True):
            log_probs[i], entropy[i] = of_labels(values, rows[i]), -(values.exp() * values).sum(-1)
        if other_prompts:
            own = np.array([float(log_probs[i].sum()) for i in judged.tolist()])
            contradicted[judged] = contradiction(own, elsewhere(copy, mine, recipe.seed))
    order = range(len(rows))
    return Judged([log_probs[i] for i in order], [entropy[i] for i in order], contradicted if other_prompts else None)


def elsewhere(model: Any, rows: Sequence[Encoded], seed: int) -> np.ndarray:
    """``[rows, PROMPTS]`` log-prob of each row's answer under the prompts of others, -inf where there are fewer."""
    near = nearest_prompts([np.array(row.prompt) for row in rows], seed)
    out = np.full(near.shape, -np.inf)
    for column in range(near.shape[1]):
        places = np.flatnonzero(near[:, column] >= 0).tolist()
        moved = [replace(rows[i], prompt=rows[near[i, column]].prompt) for i in places]
        for i, row, values in zip(places, moved, completion_log_probs(model, moved), strict=True):
            out[i, column] = float(of_labels(values, row).sum())
    return out


def with_crossfit(
    rows: Sequence[Encoded], known: Sequence[Reference], told: Judged, base: Callable[[], Any]
) -> tuple[list[Reference], ScoredRows]:
    """What is known of the rows with the copies' verdicts, and all of it as the filter takes it."""
    of_row = np.repeat(np.arange(len(rows)), [len(values) for values in told.log_probs])
    said: list[Any] = [one.label_log_probs for one in known]
    base_says, copies_say = (torch.cat(list(values)).cpu().numpy() for values in (said, told.log_probs))
    fields, _ = witness_fields(base_says, copies_say, of_row)
    ends = np.cumsum([len(values) for values in told.log_probs])[:-1]
    parts = {name: np.split(values, ends) for name, values in fields.items()}
    device = told.log_probs[0].device
    found = [
        replace(one, **{name: torch.from_numpy(of_rows[i]).to(device) for name, of_rows in parts.items()})
        for i, one in enumerate(known)
    ]
    entropy = [-(values.exp() * values).sum(-1) for values in completion_log_probs(base(), rows)]
    evidence = ScoredRows.of(
        [row.prompt + row.completion for row in rows], masks_of(rows), _arrays(said), _arrays(entropy),
        crossfit=_arrays(told.log_probs), crossfit_entropy=_arrays(told.entropy), contradiction=told.contradiction,
    )  # fmt: skip
    return found, evidence


def _arrays(values: Sequence[torch.Tensor]) -> list[np.ndarray]:
    return [value.cpu().numpy() for value in values]


def forward_steps(rows: int, steps: int, batch_size: int) -> int:
    """What a cross-fit costs beside the run itself, in optimizer steps: its copies' training, and all that they score.

    Example:
        >>> forward_steps(640, 40, 16)
        187
    """
    passes = 2 + PROMPTS  # base and copy on each row, and the copy on each answer under other prompts
    return FOLDS * steps + ceil(FORWARD * passes * rows / batch_size)
