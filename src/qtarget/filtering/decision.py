"""From evidence to a verdict: are there two kinds of rows at all, and which of them are bad?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["two kinds", "cannot tell", "kept by share", "not filtered"]


@dataclass(frozen=True)
class Decision:
    """What to do with each row, and why.

    Attributes:
        keep: ``[rows]`` booleans. All true under ``cannot tell`` and ``not filtered``.
        posterior: ``[rows]`` P(row is bad) in [0, 1]. All 0 where nothing can be told; 0 or 1 under ``kept by share`` where
            the evidence shows no two kinds.
        verdict: ``two kinds``, ``cannot tell``, ``kept by share`` (the user said how many), or ``not filtered``.
        rule: the score that decided (``auto`` names the one it took).
        threshold: a row is dropped where its score is above; None where none is dropped.
        score: ``[rows]`` of ``rule``, larger is worse.
        summary: one sentence: "two kinds: 77 of 400 rows look bad (...)".
    """

    keep: np.ndarray
    posterior: np.ndarray
    verdict: Verdict
    rule: str
    threshold: float | None
    score: np.ndarray
    summary: str

    @property
    def dropped(self) -> int:
        """How many rows are left out."""
        return int((~self.keep).sum())
