"""Numbers a row, against plain loops over the rows."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.core.errors import ConfigError, ShapeError
from qtarget.data.agreement import agreement
from qtarget.filtering import WITNESSES, ScoredRows


def random_rows(count: int = 40, seed: int = 0) -> tuple[list, list, list, list, list]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 30, rng.integers(3, 20)) for _ in range(count)]
    masks = []
    for row in ids:
        mask = rng.random(len(row)) < 0.5
        mask[0], mask[-1] = False, True
        masks.append(mask)
    numbers = [[rng.exponential(2.0, mask.sum()) for mask in masks] for _ in range(3)]
    return ids, masks, [-x for x in numbers[0]], numbers[1], [-x for x in numbers[2]]


def test_each_witness_is_what_its_formula_says() -> None:
    ids, masks, log_probs, entropy, alone = random_rows()
    copies = [p * 0.5 for p in alone], [h * 0.3 for h in entropy]
    rows = ScoredRows.of(ids, masks, log_probs, entropy, alone, None, *copies)
    agreed = agreement(ids, masks)

    def worst(values):
        return np.sort(values)[-3:].mean()

    expected = {
        "surprise": [worst(-p - h) for p, h in zip(log_probs, entropy, strict=True)],
        "agreement": [np.mean(-np.log(a + 0.02)) for a in agreed],
        "combined": [worst((-p - h) * (1 - a)) for p, h, a in zip(log_probs, entropy, agreed, strict=True)],
        "gain": [np.mean(b - p) for p, b in zip(log_probs, alone, strict=True)],
        "crossfit": [worst(-p - h) for p, h in zip(*copies, strict=True)],
    }
    assert set(expected) == set(WITNESSES)
    for name, values in expected.items():
        np.testing.assert_allclose(WITNESSES[name].score(rows), values, rtol=1e-5, err_msg=name)


def test_without_entropy_it_is_the_plain_surprise() -> None:
    rows = ScoredRows.of([[1, 2]], [[False, True]], [[-3.0]])
    assert WITNESSES["surprise"].score(rows).tolist() == [3.0]


def test_gain_needs_the_answers_alone() -> None:
    with pytest.raises(ConfigError, match="--rule gain"):
        WITNESSES["gain"].score(ScoredRows.of([[1, 2]], [[False, True]], [[-3.0]]))


def test_crossfit_needs_copies() -> None:
    with pytest.raises(ConfigError, match="--rule crossfit"):
        WITNESSES["crossfit"].score(ScoredRows.of([[1, 2]], [[False, True]], [[-3.0]]))


@pytest.mark.parametrize(
    ("mask", "log_probs"),
    [([False, True], [[-1.0, -2.0]]), ([False, False], [[]])],
    ids=["too many", "no trained token"],
)
def test_rows_and_numbers_must_fit(mask, log_probs) -> None:
    with pytest.raises(ShapeError, match="one each"):
        ScoredRows.of([[1, 2]], [mask], log_probs)


def test_no_rows_have_no_scores() -> None:
    rows = ScoredRows.of([], [], [], [])
    assert len(WITNESSES["surprise"].score(rows)) == len(WITNESSES["agreement"].score(rows)) == 0
