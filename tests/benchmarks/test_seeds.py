"""Bootstrap intervals against the normal approximation and against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.benchmarks.seeds import bootstrap_interval, bootstrap_means, percentiles
from qtarget.core.errors import ShapeError


def test_many_values_give_the_normal_interval():
    values = np.random.default_rng(1).normal(10, 2, 400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_a_difference_is_paired():
    rough = np.random.default_rng(2).normal(50, 10, 5)
    found = bootstrap_interval(rough + 1.0 - rough)  # every seed gains one point
    assert (found.mean, found.low, found.high) == pytest.approx((1, 1, 1))
    means = bootstrap_means(np.stack([rough[:, None], rough[:, None] + 1.0]))
    assert np.allclose(means[1] - means[0], 1.0) and means[0].std() > 1


def test_prompts_are_resampled_across_seeds():
    prompts = np.random.default_rng(3).random((1, 100)) < 0.5
    values = np.repeat(prompts, 4, axis=0)  # all seeds answer the same prompts: prompts alone vary
    assert bootstrap_means(values).std() == pytest.approx(values[0].std() / 10, rel=0.06)
    seeds = np.repeat([[0.0], [0.0], [1.0], [1.0]], 100, axis=1)  # seeds alone vary
    assert bootstrap_means(seeds).std() == pytest.approx(0.5 / 2, rel=0.06)


def test_the_seed_decides_the_draws():
    values = np.arange(5.0)
    assert bootstrap_interval(values, 3) == bootstrap_interval(values, 3)
    assert (bootstrap_means(values[:, None], 3) != bootstrap_means(values[:, None], 4)).any()


def test_infinite_draws_make_an_infinite_end():
    assert percentiles(np.array([1.0] * 900 + [np.inf] * 100)) == (1.0, np.inf)


@pytest.mark.parametrize("values", [[], [[[1.0]]]])
def test_other_shapes_are_refused(values):
    with pytest.raises(ShapeError, match="shape"):
        bootstrap_interval(values)
