"""Rows of one prompt are in one fold, folds are even, and who is where follows from the rows and the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.core.errors import DataError, ShapeError
from qtarget.data.crossfit.folds import assign_folds, prompt_key


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_groups_stay_together_and_folds_are_even(folds: int) -> None:
    rng = np.random.default_rng(folds)
    keys = [bytes([int(k)]) for k in rng.integers(0, 60, size=400)]
    found = assign_folds(keys, folds, seed=1)
    assert all(len({int(f) for f, k in zip(found, keys) if k == key}) == 1 for key in set(keys))
    sizes = np.bincount(found, minlength=folds)
    largest_group = max(keys.count(key) for key in set(keys))
    assert sizes.max() - sizes.min() <= largest_group
    assert sizes.min() > 0


def test_the_order_of_the_rows_decides_nothing_and_the_seed_does() -> None:
    keys = [bytes([k]) for k in range(50)]
    found = assign_folds(keys, 2, seed=3)
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(assign_folds([keys[i] for i in order], 2, seed=3), found[order])
    assert (assign_folds(keys, 2, seed=4) != found).any()


def test_a_prompt_is_what_stands_before_the_first_trained_token() -> None:
    same = prompt_key([5, 6, 7, 8], [False, False, True, True])
    assert same == prompt_key(np.array([5, 6, 9]), np.array([False, False, True]))
    assert same != prompt_key([5, 7, 7, 8], [False, False, True, True])
    text = [False, True, True]  # no prompt: the whole row
    assert prompt_key([1, 2, 3], text) == prompt_key([1, 2, 3], text) != prompt_key([1, 2, 4], text)


def test_what_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(DataError, match="2 different prompts for 3 folds"):
        assign_folds([b"a", b"b", b"a", b"a"], 3)
    with pytest.raises(ShapeError, match="at least 2"):
        assign_folds([b"a", b"b"], 1)
