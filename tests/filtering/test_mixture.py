"""Two components against one: what is fitted is what was drawn, and one skewed component is not two."""

from __future__ import annotations

import numpy as np
import pytest

from qtarget.filtering.evidence import APART
from qtarget.filtering.mixture import Component, Mixture, compare, fit_component

GRID = np.linspace(-20, 60, 20001)


@pytest.mark.parametrize("tail", ["normal", "exponential"])
def test_a_density_has_mass_one_and_its_mean(tail) -> None:
    component = Component(1.0, 0.7, 2.0, tail)
    density = np.exp(component.log_density(GRID))
    assert np.trapezoid(density, GRID) == pytest.approx(1, abs=1e-3)
    assert np.trapezoid(density * GRID, GRID) == pytest.approx(component.mean, abs=1e-2)


@pytest.mark.parametrize("tail", ["normal", "exponential"])
def test_a_fit_is_as_likely_as_any_of_its_kind(tail) -> None:
    rng = np.random.default_rng(0)
    x, counts = np.linspace(-3, 12, 300), np.zeros(300)
    np.add.at(counts, np.clip(((rng.gamma(2, 1.5, 3000) + 3) / 15 * 300).astype(int), 0, 299), 1)
    found = fit_component(x, counts, tail)
    best = (counts * found.log_density(x)).sum()
    for mode in np.linspace(0, 4, 9):
        for left in (0.5, 0.8, 1.2, 2.0):
            for right in (0.8, 1.5, 2.5, 4.0):
                other = Component(float(mode), left, right, tail)
                assert (counts * other.log_density(x)).sum() <= best + 1e-6 * len(x) * abs(best) / 300


def test_no_side_is_narrower_than_half_a_nat() -> None:
    x = np.linspace(0, 1, 50)
    found = fit_component(x, (x < 0.03).astype(float), "normal")
    assert (found.left, found.right) == (0.5, 0.5)


def test_two_kinds_are_found_with_their_share() -> None:
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.exponential(0.6, 400), rng.normal(7, 1.5, 100)])
    found = compare(scores)
    assert found is not None
    assert found.gain > 5 * found.error > 0
    assert found.mixture.share == pytest.approx(0.2, abs=0.03)
    bad = found.mixture.posterior(scores) > 0.5
    assert bad[400:].mean() > 0.95
    assert bad[:400].mean() < 0.02


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("shape", ["exponential", "normal", "gamma", "spike", "uniform"])
def test_one_skewed_component_is_no_two(shape, seed) -> None:
    rng = np.random.default_rng(seed)
    scores = {
        "exponential": lambda: rng.exponential(2.0, 600),
        "normal": lambda: rng.normal(3, 2, 600),
        "gamma": lambda: rng.gamma(3, 1.0, 600),
        "spike": lambda: np.where(rng.random(600) < 0.7, rng.normal(0, 0.02, 600), rng.exponential(1.0, 600)),
        "uniform": lambda: rng.uniform(0, 3, 600),
    }[shape]()
    found = compare(scores, seed)
    assert found is not None
    apart = found.mixture.bad.mean - found.mixture.good.mode
    assert found.gain < max(5, 3 * found.error) or apart < APART


def test_scores_that_are_alike_are_not_compared() -> None:
    assert compare(np.full(100, 3.0)) is None


def test_a_posterior_never_falls() -> None:
    wide = Mixture(Component(2, 0.5, 3, "exponential"), Component(5, 4, 1, "normal"), 0.5)
    found = wide.posterior(np.random.default_rng(0).uniform(-5, 40, 500))
    scores = np.random.default_rng(0).uniform(-5, 40, 500)
    assert (np.diff(found[np.argsort(scores)]) >= 0).all()
    assert wide.posterior(np.array([-5.0, 1.0]))[0] == 0


def test_the_folds_are_seeded() -> None:
    scores = np.random.default_rng(2).exponential(1, 200)
    assert compare(scores, 3) == compare(scores, 3)
