"""``qtarget bench speed`` measures what it says, at a size of seconds."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from typer.testing import CliRunner

import qtarget
from qtarget.benchmarks.speed import figure as speed_figure
from qtarget.benchmarks.speed import losses as speed
from qtarget.benchmarks.speed import memory, sweep
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError
from qtarget.data.embedded import base_model_path
from qtarget.storage.locks import locked_file

SMALL = ["bench", "speed", "--tokens", "12", "--width", "8", "--vocab", "256", "--rounds", "2", "--threads", "1"]


def invoke(*options: str) -> str:
    result = CliRunner().invoke(app, [*SMALL, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_target_is_timed_and_the_raw_rounds_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "compile_obstacle", lambda device: "the annotations' checker is on")
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
    live, five = (results["rows"][name] for name in ("target_sft, live teacher", "floor, 5 products"))
    assert live["floor"] == "floor, 4 products"
    assert live["ratio_to_five_products"]["median"] == pytest.approx(live["median"] / five["median"])


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
    monkeypatch.setattr(memory, "MEMORY", ("sft",))
    output = invoke("--memory", "--output", str(tmp_path / "m.json"))
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert rows["sft"]["12"]["gradients"] == pytest.approx((256 * 8 + 12 * 8) * 4 / 1e6)
    assert "beyond both" in output


def test_what_it_does_not_know_is_refused():
    for option, value, message in (
        ("--dtype", "int8", "float32 or bfloat16"),
        ("--suite", "most", "few or short or all"),
    ):
        with pytest.raises(ConfigError, match=message):
            invoke(option, value)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            invoke("--device", "cuda")


SWEEP = ["bench", "sweep", "--shapes", "256x8,400x8", "--time-tokens", "8,16", "--memory-tokens", "8,300", "--vocabs", "512",
         "--losses", "naive;sft", "--rounds", "1", "--top-k", "4", "--threads", "1"]  # fmt: skip


@pytest.fixture
def peaks(monkeypatch):
    """Which peaks were measured; a process each would take a second a point."""
    measured = []

    def peak(name, config):
        measured.append((name, config.tokens, config.vocab))
        gradients = (config.tokens + config.vocab) * config.width * 4 / 1e6
        return {"gradients": gradients, "beyond_inputs": gradients + (50 if name == "sft" else config.tokens)}

    monkeypatch.setattr(sweep, "measured_peak", peak)
    return measured


def test_a_sweep_that_was_stopped_goes_on(tmp_path, peaks, monkeypatch):
    raw = tmp_path / "sweep.json"
    monkeypatch.setattr(sweep, "NAIVE_LIMIT", 4 * 300 * 400 * 4 - 1)
    run = sweep.run_speed

    def die(point):
        if (point.tokens, point.vocab) == (16, 400):
            raise KeyboardInterrupt
        return run(point)

    monkeypatch.setattr(sweep, "run_speed", die)
    runner = CliRunner()
    assert runner.invoke(app, [*SWEEP, "--output", str(raw)]).exit_code != 0
    saved = json.loads(raw.read_text())
    assert [(p["tokens"], p["vocab"]) for p in saved["time"]] == [(8, 256), (16, 256), (8, 400)]
    before = len(peaks)
    monkeypatch.setattr(sweep, "run_speed", run)
    finished = runner.invoke(app, [*SWEEP, "--resume", "--output", str(raw)], catch_exceptions=False)
    assert finished.exit_code == 0, finished.output
    assert len(peaks) == before == 2 * 5 - 2  # five shapes, naive computed and not run at two of them
    results = json.loads(raw.read_text())
    assert results["time"][:3] == saved["time"]
    assert len(results["time"]) == 4
    computed = {(p["tokens"], p["vocab"]): p["computed"] for p in results["memory"] if "computed" in p}
    assert computed == {(300, 400): 4 * 300 * 400 * 4 / 1e6, (2048, 512): 4 * 2048 * 512 * 4 / 1e6}
    with pytest.raises(ConfigError, match="top_k was 4, is 5"):
        runner.invoke(app, [*SWEEP, "--resume", "--output", str(raw), "--top-k", "5"], catch_exceptions=False)


def test_the_figure_says_what_the_numbers_say(tmp_path, peaks, monkeypatch):
    raw, picture = tmp_path / "sweep.json", tmp_path / "sweep.png"
    CliRunner().invoke(app, [*SWEEP, "--output", str(raw)], catch_exceptions=False)
    drawn = CliRunner().invoke(app, ["bench", "figure", str(raw), "--output", str(picture)], catch_exceptions=False)
    assert drawn.exit_code == 0, drawn.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    results = json.loads(raw.read_text())
    figure = speed_figure.speed_figure(results)
    title = " ".join(figure.get_suptitle().split())
    assert title == (
        "From 8 to 300 tokens at V = 400, no measured target without a live teacher takes more than 50 MB beyond its gradients; "
        "naive cross entropy takes 300 MB"
    )
    assert [a.get_xlabel() for a in figure.axes] == ["supervised tokens N"] * 2 + ["vocabulary V"] + [
        "supervised tokens N"
    ] * 2
    [line] = [x for x in figure.axes[1].get_lines() if x.get_label() == "naive cross entropy"]
    assert line.get_xydata() == pytest.approx(torch.tensor([[8.0, 8.0], [300.0, 300.0]]).numpy())
    with pytest.raises(ConfigError, match="not what `qtarget bench sweep` writes"):
        CliRunner().invoke(app, ["bench", "figure", str(picture)], catch_exceptions=False)


def test_a_shape_that_is_none_is_refused(tmp_path):
    for option, value in (("--shapes", "49152"), ("--time-tokens", "few"), ("--losses", "sft;best")):
        with pytest.raises(ConfigError, match=option):
            CliRunner().invoke(app, [*SWEEP, option, value, "--output", str(tmp_path / "s")], catch_exceptions=False)


@pytest.mark.slow
def test_whole_steps_of_both_trainers(tmp_path):
    """Both really train, on the same rows: TRL's loss and that of ``sft`` agree step by step."""
    small = [
        "--batch",
        "2",
        "--length",
        "16",
        "--layers",
        "1",
        "--width",
        "18",
        "--vocab",
        "300",
        "--rounds",
        "2",
        "--top-k",
        "4",
    ]
    raw = tmp_path / "t.json"
    options = [*small, "--threads", "1", "--targets", "sft,asft", "--output", str(raw), "--no-memory"]
    done = CliRunner().invoke(app, ["bench", "trainer", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = json.loads(raw.read_text())["rows"]
    assert list(rows) == ["TRL SFTTrainer", "sft", "asft"]
    for row in rows.values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["ratio"]["median"] == pytest.approx(row["median"] / rows["TRL SFTTrainer"]["median"])
    losses = re.findall(r"(?:\{'loss': '|step \d+: loss )([\d.]+)", done.output)  # TRL's lines and ours
    assert len(losses) == 9
    assert losses[0:9:3] == losses[1:9:3]  # TRL's and ours
    with pytest.raises(ConfigError, match="token scope"):
        CliRunner().invoke(app, ["bench", "trainer", "--targets", "talr"], catch_exceptions=False)
    theirs = ["--model", str(base_model_path()), "--batch", "1", "--length", "16", "--rounds", "1", "--targets", "sft"]
    options = [*theirs, "--threads", "1", "--output", str(raw), "--no-memory"]
    assert CliRunner().invoke(app, ["bench", "trainer", *options], catch_exceptions=False).exit_code == 0
    config, model = json.loads(raw.read_text())["config"], json.loads((base_model_path() / "config.json").read_text())
    assert (config["vocab"], config["layers"]) == (model["vocab_size"], model["num_hidden_layers"])


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


def test_two_benchmarks_do_not_write_one_file(tmp_path):
    output = tmp_path / "s.json"
    with locked_file(output):
        # the same process, as another one that lives
        result = CliRunner().invoke(app, [*SMALL, "--suite", "few", "--no-peers", "--output", str(output)])
        assert isinstance(result.exception, ConfigError)
        assert f"another process is writing {output}: process {os.getpid()} on" in str(result.exception)
        assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == []
