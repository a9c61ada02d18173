"""Time the audit's checks on synthetic rows of random tokens: `python scripts/time_audit.py`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qtarget.data.checks.audit import audit_rows
from qtarget.data.checks.text import check_texts
from qtarget.data.checks.tokens import Vocabulary, check_tokens
from qtarget.report.audit.noise import check_noise
from qtarget.report.audit.prior import check_prior
from qtarget.report.audit.scored import ScoredTokens

VOCABULARY = 50_000


def timed(name: str, check: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    check()
    seconds = time.perf_counter() - begin
    print(f"  {name}: {seconds:.2f} s")
    return seconds


def scored(ids: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> ScoredTokens:
    """A base that is sure of itself half of the time and right as often."""
    rows, length = ids.shape
    flat, count = ids.reshape(-1), len(places)
    labels = flat[places]
    tops = np.where(rng.random(count) < 0.6, labels, rng.zipf(1.3, count) % VOCABULARY)
    return ScoredTokens(
        flat,
        np.arange(rows + 1) * length,
        np.arange(rows),
        places,
        -rng.exponential(2, count).astype(np.float32),
        rng.random(count).astype(np.float32),
        tops,
        np.log(rng.random(count) * 0.3 + 0.7).astype(np.float32),
        (tops == labels).astype(int),
    )


def run(rows: int, length: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.zipf(1.3, (rows, length)) % VOCABULARY
    labels = ids.copy()
    labels[:, : length // 4] = -100
    tokens = [{"input_ids": a, "labels": b} for a, b in zip(ids, labels)]
    texts = [{"prompt": f"question {i % (rows // 2)} " * 5, "completion": f"answer {i} " * length} for i in range(rows)]
    vocabulary = Vocabulary(VOCABULARY, frozenset({1}), 2, frozenset({3, 4, 5}), str)
    base = scored(ids, np.flatnonzero(labels.reshape(-1) != -100), rng)
    print(f"{rows} rows of {length} tokens")
    total = timed("supervision", lambda: audit_rows(tokens, max_length=length - 10))
    total += timed("tokens", lambda: check_tokens(tokens, vocabulary, max_length=length))
    total += timed("texts", lambda: check_texts(texts))
    total += timed("noise", lambda: check_noise(base, str))
    total += timed("flawed prior", lambda: check_prior(base, str))
    print(f"  all: {total:.1f} s")


if __name__ == "__main__":
    run(5_000, 512)
    run(100_000, 64)
