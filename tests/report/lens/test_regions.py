"""Trust regions under the lens: the frozen model samples, and every token has one advantage."""

from __future__ import annotations

import pytest

from qtarget.core.errors import HyperparameterError
from qtarget.report.lens.document import look
from qtarget.report.lens.losses import load_loss


@pytest.mark.parametrize(
    ("text", "a"),
    [
        ("policy_gradient", "p_y / mu(y)"),
        ("policy_gradient(advantage=2)", "2 (p_y / mu(y))"),
        ("cispo", "min(p_y / mu(y), 3)"),
    ],
)
def test_the_weight_is_named(text, a) -> None:
    form = look(load_loss(text))["form"]
    assert form["fits"]
    assert form["a"]["name"] == a


def test_signs_of_weights() -> None:
    """A mask leaves no pull the wrong way, a quadratic price does; a negative advantage turns the pull round."""
    smallest = {t: look(load_loss(t))["form"]["a"]["smallest"] for t in ("dppo_tv", "drpo", "dppo_tv(advantage=-1)")}
    assert smallest["dppo_tv"] == 0
    assert smallest["drpo"] < 0
    assert smallest["dppo_tv(advantage=-1)"] < -1


@pytest.mark.parametrize("advantage", ["'much'", "1e999"])
def test_an_advantage_that_is_no_number(advantage) -> None:
    with pytest.raises(HyperparameterError, match="advantage"):
        load_loss(f"dppo_tv(advantage={advantage})")
