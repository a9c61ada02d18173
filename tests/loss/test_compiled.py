"""Whole rows of logits through torch.compile: the same numbers as the oracle's, compiled once a target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtarget
from qtarget.core.errors import IncompatibleError
from qtarget.loss.whole_rows import compile_obstacle

needs_compiler = pytest.mark.skipif(bool(compile_obstacle("cpu")), reason=compile_obstacle("cpu") or "none")
WORKER = Path(__file__).with_name("compiled.py")


def drawn() -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=rng).requires_grad_() for n in (5, 30))
    return hidden, weight, torch.randint(30, (5,), generator=rng)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "settings", "other"),
    [
        pytest.param("generalized_jsd", {"beta": 0.3}, {"beta": 0.6}, marks=pytest.mark.nightly),
        ("target_sft", {"eta": 0.3}, {"eta": 0.7}),
        pytest.param("gem", {}, {"temperature": 0.8}, marks=pytest.mark.nightly),
    ],
)
def test_the_oracles_numbers_compiled_once(name: str, settings: dict, other: dict) -> None:
    """Of live frozen heads and of the model itself; the worker says what is held."""
    worker(name, json.dumps(settings), json.dumps(other))


@needs_compiler
def test_refusals_wide_heads_and_the_benchmark() -> None:
    """See the worker's checks."""
    worker()


def worker(*arguments: str) -> None:
    done = subprocess.run([sys.executable, str(WORKER), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_compiled_is_refused(monkeypatch) -> None:
    hidden, weight, labels = drawn()
    with pytest.raises(IncompatibleError, match="columns and sums leave nothing to compile; use backend='auto'"):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", backend="compiled")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(IncompatibleError, match="needs a C\\+\\+ compiler on a CPU: install g\\+\\+"):
        qtarget.linear_target_loss(hidden, weight, labels, "gem", backend="compiled")


def test_the_choice_is_explained() -> None:
    hidden, weight, _ = drawn()
    assert "backend='compiled' fuses them" in str(qtarget.explain_backend(hidden, weight, "gem"))
    if not compile_obstacle("cpu"):
        choice = qtarget.explain_backend(hidden, weight, "gem", backend="compiled")
        assert choice.backend == "compiled"
        assert "compiled autograd" in str(choice)
