"""Intervals against textbook values, the normal approximation, and coverage."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.core.errors import ShapeError
from qtarget.report import intervals
from qtarget.report.intervals import paired_interval, ratio_interval, share_interval, wilson


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(81, 263, 0.255289, 0.366212), (15, 148, 0.062386, 0.160538), (0, 20, 0.0, 0.161125), (29, 29, 0.883027, 1.0)],
)
def test_wilson_is_newcombes(right, rows, low, high):
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3, prints the first two to four digits."""
    assert wilson(right, rows) == pytest.approx((low, high), abs=2e-4)


def test_a_mean_of_shares_has_the_normal_interval_where_rows_are_many():
    values = np.random.default_rng(1).choice([0.0, 0.25, 1.0], 4000).tolist()
    found = share_interval(values)
    spread = 1.96 * np.std(values) / np.sqrt(len(values))
    assert found["method"] == "bootstrap" and found["mean"] == pytest.approx(np.mean(values))
    assert found["low"] == pytest.approx(np.mean(values) - spread, abs=0.1 * spread)
    assert found["high"] == pytest.approx(np.mean(values) + spread, abs=0.1 * spread)


def test_a_ratio_weighs_rows_by_their_tokens():
    assert ratio_interval([2.0, 30.0], [1, 10])["mean"] == pytest.approx(32 / 11)
    assert ratio_interval([3.0, 30.0], [1, 10]) == {"mean": 3.0, "low": 3.0, "high": 3.0, "method": "bootstrap"}


def test_pairing_removes_what_rows_have_in_common():
    rows = np.random.default_rng(2).normal(0, 10, 300)
    better = (rows + 1).tolist()
    found = paired_interval(better, rows.tolist())
    assert (found["low"], found["high"]) == pytest.approx((1, 1))
    alone = ratio_interval(better, [1.0] * 300)
    assert alone["high"] - alone["low"] > 1


def test_the_bootstrap_holds_the_truth_about_as_often_as_it_says():
    random, held = np.random.default_rng(3), 0
    for trial in range(200):
        found = ratio_interval(random.exponential(1.0, 100).tolist(), [1.0] * 100, seed=trial)
        held += found["low"] <= 1 <= found["high"]
    assert 180 <= held <= 198


def test_pieces_of_draws_are_seeded_and_change_nothing_in_law(monkeypatch):
    values = np.random.default_rng(4).normal(size=50).tolist()
    whole = ratio_interval(values, [1.0] * 50)
    assert whole == ratio_interval(values, [1.0] * 50) != ratio_interval(values, [1.0] * 50, seed=1)
    monkeypatch.setattr(intervals, "AT_ONCE", 5000)
    pieces = ratio_interval(values, [1.0] * 50)
    assert pieces["low"] == pytest.approx(whole["low"], abs=0.05)


def test_what_has_no_rows_is_refused():
    for call in (lambda: wilson(0, 0), lambda: ratio_interval([], []), lambda: paired_interval([1.0], [1.0, 2.0])):
        with pytest.raises(ShapeError):
            call()
