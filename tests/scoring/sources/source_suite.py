"""What every scoring engine must pass: subclass ``SourceSuite`` and give a fixture ``source``.

    class TestMyEngine(SourceSuite):
        knows_entropy = False

        @pytest.fixture(scope="class")
        def source(self):
            with my_server(tiny_model()) as url:
                yield MySource(url)

The oracle is a forward pass of one unpadded row at a time, in float64 from the logits on.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch

from qtarget.core.errors import DataError, HyperparameterError
from qtarget.scoring import ScoredRow, Source
from tests.scoring.helpers import VOCAB, ragged_rows, tiny_model

CANDIDATES = [0, VOCAB - 1, 7, 7]
"""Unordered, with both ends of the vocabulary and one id twice."""


@cache
def rows_and_positions() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ragged rows of 1 to 40 tokens in random order under random masks, some of them empty."""
    rows = ragged_rows(20, seed=5)
    ids = [np.array(row["input_ids"]) for row in rows]
    labels = [np.array(row["labels"]) for row in rows]
    return ids, [np.flatnonzero(at[1:] != -100) + 1 for at in labels]


@torch.no_grad()
def direct(model, ids: np.ndarray) -> np.ndarray:
    """Log-probs ``[time, vocab]``, float64: row t is about token t; row 0 is empty (NaN)."""
    log_probs = model(input_ids=torch.from_numpy(np.asarray(ids))[None]).logits[0].double().log_softmax(-1).numpy()
    return np.concatenate([np.full((1, log_probs.shape[-1]), np.nan), log_probs[:-1]])


class SourceSuite:
    """The fixture ``source`` scores ``tiny_model()``; the class attributes say what the engine can and cannot."""

    top_ks: ClassVar[tuple[int, ...]] = (0, 1, 5, VOCAB)
    knows_entropy: ClassVar[bool] = True
    knows_candidates: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5
    """Of log-probs, in nats, and of probability masses."""

    def assert_exact(self, scored: ScoredRow, ids, at, top_k: int, candidate_ids=None) -> None:
        log_probs = direct(tiny_model(), ids)[at] if len(at) else np.zeros((0, VOCAB))
        close = {"atol": self.tolerance, "rtol": 0}
        np.testing.assert_allclose(scored.label_log_probs, log_probs[np.arange(len(at)), np.asarray(ids)[at]], **close)
        assert (scored.entropy is not None) == self.knows_entropy
        if scored.entropy is not None:
            np.testing.assert_allclose(scored.entropy, -(np.exp(log_probs) * log_probs).sum(-1), **close)
        if not top_k:
            assert scored.topk_ids is scored.topk_log_probs is scored.tail_log_mass is None
        else:
            assert scored.topk_ids is not None
            assert scored.topk_log_probs is not None
            assert scored.tail_log_mass is not None
            assert scored.topk_ids.shape == scored.topk_log_probs.shape == (len(at), top_k)
            assert scored.topk_ids.dtype == np.int32
            largest = -np.sort(-log_probs, axis=-1)[:, :top_k]
            np.testing.assert_allclose(scored.topk_log_probs, largest, **close)
            # ids by their own log-probs, so that a tie within the tolerance may fall either way
            np.testing.assert_allclose(np.take_along_axis(log_probs, scored.topk_ids, -1), largest, **close)
            assert all(len(set(listed)) == top_k for listed in scored.topk_ids.tolist())
            tail = 1 - np.exp(largest).sum(-1)
            np.testing.assert_allclose(np.exp(scored.tail_log_mass), tail, **close)
        if candidate_ids is None:
            assert scored.candidate_log_probs is None
        else:
            assert scored.candidate_log_probs is not None
            np.testing.assert_allclose(scored.candidate_log_probs, log_probs[:, candidate_ids], **close)
        for name in ("label_log_probs", "entropy", "topk_log_probs", "tail_log_mass", "candidate_log_probs"):
            value = getattr(scored, name)
            assert value is None or value.dtype == np.float32, name

    def test_its_vocabulary(self, source: Source):
        assert source.vocab_size == VOCAB

    def test_ragged_rows_under_masks_in_their_order(self, source: Source):
        rows, positions = rows_and_positions()
        assert min(map(len, rows)) == 1 and any(len(ids) > 1 and not len(at) for ids, at in zip(rows, positions))
        for top_k in self.top_ks:
            scored = source.score(rows, top_k, positions=positions)
            assert len(scored) == len(rows)
            for numbers, ids, at in zip(scored, rows, positions, strict=True):
                self.assert_exact(numbers, ids, at, top_k)

    def test_positions_default_to_all_but_the_first(self, source: Source):
        rows, _ = rows_and_positions()
        for numbers, ids in zip(source.score(rows[:6], 1), rows[:6], strict=True):
            self.assert_exact(numbers, ids, np.arange(1, len(ids)), 1)

    def test_candidates(self, source: Source):
        rows, positions = rows_and_positions()
        if not self.knows_candidates:
            with pytest.raises(HyperparameterError, match="candidate"):
                source.score(rows, 1, CANDIDATES, positions=positions)
            return
        for top_k in (0, 3):
            scored = source.score(rows, top_k, CANDIDATES, positions=positions)
            for numbers, ids, at in zip(scored, rows, positions, strict=True):
                self.assert_exact(numbers, ids, at, top_k, CANDIDATES)

    def test_a_row_scores_alike_alone_and_in_company(self, source: Source):
        rows, positions = rows_and_positions()
        together = source.score(rows, 2, positions=positions)
        for i in (0, 1, len(rows) - 1):
            (alone,) = source.score([rows[i]], 2, positions=[positions[i]])
            np.testing.assert_allclose(alone.label_log_probs, together[i].label_log_probs, atol=self.tolerance)
            np.testing.assert_allclose(alone.topk_log_probs, together[i].topk_log_probs, atol=self.tolerance)

    def test_plain_lists_do(self, source: Source):
        (numbers,) = source.score([[5, 9, 3]], 1, positions=[[2]])  # pyright: ignore[reportArgumentType]
        self.assert_exact(numbers, np.array([5, 9, 3]), np.array([2]), 1)

    def test_nothing_to_do(self, source: Source):
        assert source.score([], 3) == []
        one, none = source.score([np.array([4]), np.array([4, 5, 6])], 3, positions=[np.array([]), np.array([])])
        for numbers in (one, none):
            self.assert_exact(numbers, np.array([4]), np.array([], dtype=int), 3)

    @pytest.mark.parametrize(
        ("error", "words", "arguments"),
        [
            (HyperparameterError, "top_k=62; expected 0 to 61", {"top_k": VOCAB + 1}),
            (HyperparameterError, "top_k=-1", {"top_k": -1}),
            (HyperparameterError, "candidate_ids", {"candidate_ids": [VOCAB]}),
            (DataError, "token ids from 61 to 61", {"token_ids": [np.array([VOCAB])]}),
            (DataError, "ascending ones of 1 to 2", {"positions": [np.array([0, 1])]}),
            (DataError, "ascending ones of 1 to 2", {"positions": [np.array([3])]}),
            (DataError, "ascending ones of 1 to 2", {"positions": [np.array([2, 1])]}),
            (DataError, "1 rows and 2 lists", {"positions": [np.array([1]), np.array([1])]}),
        ],
    )
    def test_what_no_engine_takes(self, source: Source, error, words, arguments):
        with pytest.raises(error, match=words):
            source.score(**{"token_ids": [np.array([1, 2, 3])], "top_k": 0, **arguments})
