"""A teacher behind a URL: asked about the samples as they are drawn, for its likeliest tokens and the mass of the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qtarget.core.shapes import Tensor
from qtarget.core.types import Reference
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.sources.engines import EngineChoice, connect, detect_engine

FIELDS = {"label_log_probs": 0.0, "topk_ids": -1, "topk_log_probs": -float("inf"), "tail_log_mass": 0.0}
"""What is kept of an answer, and what stands where nothing was asked."""
PREFIX = "teacher_"
"""Of the fields as keys of a batch."""


class ServedTeacher:
    """A server of ``qtarget serve``, vLLM or SGLang, whose tokenizer is compared with the policy's.

    Args:
        url: of the server; its numbers are taken as they are.
        policy: a model with the same vocabulary.
        tokenizer: of the policy.
        top_k: tokens that are listed; all others are one outcome.

    Raises:
        ScoringServerError: nobody answers, or the server is not what it should be.
    """

    def __init__(self, url: str, policy: Any, tokenizer: Any, top_k: int) -> None:
        choice = EngineChoice(detect_engine(url), url, trust_server=True)
        self.source = connect(choice, policy, model_id=url, tokenizer=tokenizer).source
        self.top_k = top_k

    def about(self, prompt: tuple[Tensor, Tensor], completion: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """``PREFIX`` and ``FIELDS`` of a batch, ``[batch, completion, ...]``.

        Args:
            prompt, completion: ids and mask; the prompt is the teacher's own, where it sees another.

        Raises:
            ScoringServerError: the server fails.
        """
        rows, places = [], []
        for asked, seen, said, kept in zip(*prompt, *completion, strict=True):
            before, after = asked[seen.bool()].cpu().numpy(), said[kept.bool()].cpu().numpy()
            rows.append(np.concatenate([before, after]))
            places.append(np.arange(len(before), len(before) + len(after)))
        scored = self.source.score(rows, self.top_k, positions=places)
        ids, mask = completion
        return {f"{PREFIX}{name}": spread(scored, name, fill, mask.bool(), ids.device) for name, fill in FIELDS.items()}


def spread(scored: list[ScoredRow], name: str, fill: float, mask: Tensor, device: Any) -> Tensor:
    """The numbers of all rows in one tensor, where the mask is."""
    values = torch.from_numpy(np.concatenate([getattr(row, name) for row in scored]))
    values = values.long() if name == "topk_ids" else values
    out = torch.full((*mask.shape, *values.shape[1:]), fill, dtype=values.dtype, device=device)
    out[mask] = values.to(device)
    return out


def reference_of(inputs: dict[str, Any]) -> Reference:
    """The answers of a batch over prompt and completion, unshifted."""
    start = inputs["prompt_ids"].shape[1]
    out = {}
    for name, fill in FIELDS.items():
        value = inputs[f"{PREFIX}{name}"]
        out[name] = torch.cat([value.new_full((len(value), start, *value.shape[2:]), fill), value], dim=1)
    return Reference(**out)
