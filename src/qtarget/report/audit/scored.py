"""What the base said at every label of a data set, as flat columns, with the rows that it never saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qtarget.command import command_for
from qtarget.data.checks.findings import Finding, finding
from qtarget.report.tokens import flatten_rows, numbers_at
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class ScoredTokens:
    """A frozen base at the trained tokens of some rows; log-probs and entropies in nats.

    Attributes:
        ids: ``[tokens]`` all token ids, row after row, prompts included.
        offsets: ``[rows + 1]`` row i holds ``ids[offsets[i]:offsets[i + 1]]``.
        numbers: ``[rows]`` each row's number in the user's data.
        places: ``[labels]`` index into ``ids`` of every trained token, ascending.
        log_probs: ``[labels]`` of the observed token.
        entropy: ``[labels]``.
        top_ids: ``[labels]`` the base's favourite; None without top-k in the cache, as the next two.
        top_log_probs: ``[labels]``.
        ranks: ``[labels]`` of the observed token, from 1; 0 where it is beyond the cached top-k.
    """

    ids: np.ndarray
    offsets: np.ndarray
    numbers: np.ndarray
    places: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray
    top_ids: np.ndarray | None = None
    top_log_probs: np.ndarray | None = None
    ranks: np.ndarray | None = None

    @cached_property
    def labels(self) -> np.ndarray:
        """``[labels]`` ids of the trained tokens."""
        return self.ids[self.places]

    @cached_property
    def rows(self) -> np.ndarray:
        """``[labels]`` index of each trained token's row (``numbers`` names it)."""
        return np.searchsorted(self.offsets, self.places, side="right") - 1

    @cached_property
    def excess(self) -> np.ndarray:
        """``[labels]`` surprise beyond what the base expected there: ``-log p(label) - H``; mean 0 for the base's own text."""
        return -self.log_probs.astype(np.float64) - self.entropy.astype(np.float64)

    def evidence(self, label: int, decode: Decode) -> dict[str, Any]:
        """One trained token as a finding shows it, see ``Finding.evidence``."""
        row, place = int(self.rows[label]), int(self.places[label])
        out: dict[str, Any] = {
            "row": int(self.numbers[row]),
            "position": place - int(self.offsets[row]),
            "text": decode([int(self.ids[place])]),
            "before": decode(self.ids[max(int(self.offsets[row]), place - 12) : place].tolist()),
            "log_prob": round(float(self.log_probs[label]), 4),
            "entropy": round(float(self.entropy[label]), 4),
        }
        if self.top_ids is not None and self.top_log_probs is not None and self.ranks is not None:
            out |= {
                "rank": int(self.ranks[label]) or None,
                "base_text": decode([int(self.top_ids[label])]),
                "base_probability": round(float(np.exp(self.top_log_probs[label])), 4),
            }
        return out


def score_from_cache(rows: Sequence[Mapping[str, Any]], cache: ReferenceCache) -> tuple[ScoredTokens, list[int]]:
    """Look up the rows that train on something.

    Args:
        rows: ``input_ids`` and ``labels``, cut as training cuts them; row i is row i of the data.

    Returns:
        What the cache holds, and the numbers of the rows that it lacks.
    """
    masks = [supervised_mask(row["labels"]) for row in rows]
    wanted = [i for i, mask in enumerate(masks) if np.any(mask)]
    found = cache.find([row_checksum(rows[i]["input_ids"], masks[i]) for i in wanted])
    kept = [i for i, place in zip(wanted, found) if place >= 0]
    missing = [i for i, place in zip(wanted, found) if place < 0]
    if not kept:
        nothing = np.zeros(0, np.int64)
        return ScoredTokens(nothing, np.zeros(1, np.int64), nothing, nothing, np.zeros(0), np.zeros(0)), missing
    flat = flatten_rows([{**rows[i], "qtarget_row": i} for i in kept])
    base = numbers_at(cache, [place for place in found if place >= 0])
    top: dict[str, Any] = {}
    if base.topk_ids is not None and base.topk_log_probs is not None:
        top = {
            "top_ids": base.topk_ids[:, 0].astype(np.int64),
            "top_log_probs": base.topk_log_probs[:, 0].astype(np.float32),
            "ranks": base.ranks(flat.labels),
        }
    places = np.flatnonzero(flat.supervised)
    return ScoredTokens(
        flat.ids, flat.offsets, flat.numbers, places, base.label_log_probs, base.entropy, **top
    ), missing


def check_coverage(missing: Sequence[int], of: int, cache: ReferenceCache) -> list[Finding]:
    """Rows that the cache lacks: training with it refuses to start."""
    again = command_for("score", "--top_k", "32", "--output", "new_cache")
    step = f"their tokens or their mask differ from every scored row: run `{again}`, and set `--reference new_cache`"
    what = f"are not in the cache {cache.path.name} (of model {cache.manifest.model_id!r})"
    return finding("cache_coverage", "error", missing, of, what, step, cache_rows=len(cache))
