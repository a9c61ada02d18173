"""``qtarget bench speed`` measures what it says, at a size of seconds."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import qtarget
from qtarget.benchmarks import speed
from qtarget.cli.app import app
from qtarget.errors import ConfigError

SMALL = ["bench", "speed", "--tokens", "12", "--width", "8", "--vocab", "256", "--rounds", "2", "--threads", "1"]


def invoke(*options: str) -> str:
    result = CliRunner().invoke(app, [*SMALL, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_target_is_timed_and_the_raw_rounds_are_kept(tmp_path):
    output = invoke("--suite", "all", "--no-peers", "--output", str(tmp_path / "s.json"))
    results = json.loads((tmp_path / "s.json").read_text())
    assert set(qtarget.available_targets()) < set(results["rows"])
    assert results["config"]["vocab"] == 256
    assert results["machine"]["torch"] == torch.__version__
    for name, row in results["rows"].items():
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
        floor = results["rows"][row["floor"]]
        assert row["ratio"]["median"] == pytest.approx(row["median"] / floor["median"])
        assert name in output
    assert results["rows"]["target_sft, live teacher"]["floor"] == "floor, 4 products"


def test_other_libraries_compute_the_same_loss():
    """A comparison of speed is one only if the gradients agree."""
    problem = speed.Problem.make(speed.SpeedConfig(tokens=40, width=8, vocab=300))
    seen = {}

    def keep(loss, *leaves):
        seen["found"] = torch.autograd.grad(loss, leaves)

    original, speed.backward = speed.backward, keep
    try:
        steps = speed.peers(problem)
        assert {"naive", "TRL tiled head", "torch linear_cross_entropy, compact"} <= set(steps)
        speed.ours(problem, "sft")()
        ours = seen["found"]
        for name, step in steps.items():
            step()
            for a, b in zip(seen["found"], ours, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        speed.backward = original


def test_memory_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "MEMORY", ("sft",))
    output = invoke("--memory", "--output", str(tmp_path / "m.json"))
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert rows["sft"]["12"]["gradients"] == pytest.approx((256 * 8 + 12 * 8) * 4 / 1e6)
    assert "beyond both" in output


def test_what_it_does_not_know_is_refused():
    for option, value, message in (("--dtype", "int8", "float32 or bfloat16"), ("--suite", "most", "short or all")):
        with pytest.raises(ConfigError, match=message):
            invoke(option, value)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            invoke("--device", "cuda")


def test_scoring_is_timed_against_its_floor(tmp_path):
    """Small shapes: what is checked is the book-keeping, and that scoring does all that the floor does."""
    path = tmp_path / "scoring.json"
    options = ["--rows", "4", "--layers", "1", "--width", "18", "--vocab", "500", "--rounds", "2", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", "score", *options, "--output", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    results = json.loads(path.read_text())
    assert list(results["rows"]) == ["floor", "top_k 0", "top_k 32"]
    assert results["tokens"]["all"] > results["tokens"]["supervised"] > 0
    for name, row in results["rows"].items():
        ratios = sorted(a / b for a, b in zip(row["seconds"], results["rows"]["floor"]["seconds"]))
        assert [row["ratio"]["low"], row["ratio"]["high"]] == pytest.approx(ratios)
        assert name in result.output
