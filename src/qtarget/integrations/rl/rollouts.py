"""A few samples of each log line as rows of text and numbers, for ``qtarget inspect`` and ``qtarget report``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qtarget.core.shapes import Tensor
from qtarget.integrations.rl.batch import Samples
from qtarget.integrations.shared.step import TargetOutput

REWARDS = "sample_rewards"
"""Key of a batch: rewards of its samples, ``[batch, functions]``; TRL 1.16 shuffles every tensor along."""
DIGITS = 5
"""Significant ones of every number kept."""


def own_rewards(logs: Any, names: Sequence[str], count: int, process: int, processes: int) -> Tensor:
    """``[count, functions]`` rewards of the samples that this process has just drawn, NaN where a function scored none.

    TRL 1.16 gathers rewards over all processes in the order of the prompts and keeps the newest.

    Args:
        logs: TRL's ``_logs["rewards"]``.
        count: samples of this process.
    """
    columns = [list(logs[name])[-count * processes :][process * count : (process + 1) * count] for name in names]
    return torch.tensor([[math.nan if v is None else v for v in column] for column in columns]).T


def rollout_rows(
    inputs: dict[str, Any],
    samples: Samples,
    output: TargetOutput,
    advantages: Tensor,
    given: Tensor,
    tokenizer: Any,
    rewards: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """The first samples of a micro-batch, as `qtarget.report.runs.rollouts` reads them.

    Args:
        advantages: ``[batch, time]``, unshifted, of the samples.
        given: the same as the loss read them, perhaps divided by lengths.
        rewards: names of the reward functions; none where nothing reads rewards.
    """
    assert output.label_log_probs is not None and output.label_weights is not None and output.losses is not None
    start = inputs["prompt_ids"].shape[1]
    # numbers are shifted: entry t - 1 is about the token at t
    log_probs, pulls, losses = (
        v[:, start - 1 :] for v in (output.label_log_probs, output.label_weights, output.losses)
    )
    trained = (samples.labels != -100)[:, start:]
    anchor = log_probs if samples.anchor is None else samples.anchor[:, start:]
    weights = pulls / ((log_probs - anchor).clamp(-20, 20).exp() * given[:, start:])
    rows = []
    for i in range(min(count, len(log_probs))):
        shown = inputs["completion_mask"][i].bool()
        ids = inputs["completion_ids"][i][shown].tolist()
        kept = trained[i][shown]
        columns = {
            "log_probs": log_probs,
            "anchor": anchor,
            "advantages": advantages[:, start:],
            "weights": weights,
            "losses": losses,
        }
        row: dict[str, Any] = {
            "prompt": tokenizer.decode(inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]),
            "completion": tokenizer.decode(ids, skip_special_tokens=True),
            "ids": ids,
            "tokens": [tokenizer.decode([token]) for token in ids],
        }
        if len(rewards):
            row["rewards"] = {n: plain(v) for n, v in zip(rewards, inputs[REWARDS][i].tolist(), strict=True)}
        row |= {name: numbers(value[i][shown], kept) for name, value in columns.items()}
        rows.append(row)
    return rows


def numbers(values: Tensor, kept: Tensor) -> list[float | None]:
    """Numbers of one sample's tokens; None where not trained on, and where there is no number.

    Example:
        >>> numbers(torch.tensor([0.123456789, 1.0, torch.nan]), torch.tensor([True, False, True]))
        [0.12346, None, None]
    """
    return [plain(v) if k else None for v, k in zip(values.detach().float().tolist(), kept.tolist(), strict=True)]


def plain(value: float) -> float | None:
    """A number with few digits, None where JSON has no word for it."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
