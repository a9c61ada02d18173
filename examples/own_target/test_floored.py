"""The contract, and a number worked out by hand. Run: pytest examples/own_target/test_floored.py"""

import math

import pytest
import torch

import qtarget
from examples.own_target.floored import Floored


def test_it_keeps_the_contract():
    qtarget.check_target(Floored())


def test_the_loss_is_the_formula():
    # four tokens, equally likely: p_y = 1/4, w = 0.2 + 0.8 x 1/4 = 0.4
    loss = qtarget.target_loss(torch.zeros(1, 4), torch.tensor([2]), Floored(floor=0.2))
    assert float(loss) == pytest.approx(0.4 * math.log(4))


def test_the_floor_is_checked():
    with pytest.raises(ValueError, match="floor"):
        Floored(floor=2)
