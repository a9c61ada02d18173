"""The README says what the code does: its table, its examples and its commands."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_what_its_script_writes():
    """Examples, table and numbers come from the files they are about."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from update_readme import render
    finally:
        sys.path.pop(0)
    assert render() == README


def test_numbers_in_the_text_are_those_of_the_raw_results():
    results = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    mean = {name: r["accuracy_percent"]["mean"] for name, r in results["summary"].items()}
    by_seed = {name: [r["accuracy_percent"] for r in runs] for name, runs in results["runs"].items()}
    kept = {name: r["kept_percent"]["mean"] for name, r in results["summary"].items()}
    assert all(a < b for a, b in zip(by_seed["prior_surprise"], by_seed["sft"], strict=True))
    assert mean["dft"] == mean["target_sft"] == 0
    assert abs(mean["sft_kl"] - mean["sft"]) < 2 > abs(mean["label_smoothing"] - mean["sft"])
    assert kept["sft_kl"] > kept["sft"]
    dropped = json.loads((ROOT / "benchmarks/results/demo_dropped_targets.json").read_text())
    assert all(run["accuracy_percent"] == 0 for name in ("p_power", "asft") for run in dropped["runs"][name])
    assert [r["accuracy_percent"] for r in dropped["runs"]["sft"]] == by_seed["sft"]  # the same budget and seeds
    assert (results["config"]["train_rows"], results["config"]["rate"], results["config"]["seeds"]) == (600, 0.2, 3)


def test_the_core_example_runs():
    _, core = blocks("python")  # the first is examples/train_with_trl.py, which the command line's tests run
    done = subprocess.run([sys.executable, "-c", core], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = [line.split("#")[0].split() for line in blocks("bash")[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for _, name in commands)


@pytest.mark.slow
def test_benchmark_commands_run(tmp_path, monkeypatch):
    """As written, but for the size."""
    from typer.testing import CliRunner

    from qtarget.benchmarks.speed import losses as speed
    from qtarget.benchmarks.speed import memory
    from qtarget.cli.app import app

    monkeypatch.setattr(memory, "MEMORY", ("sft",))
    monkeypatch.setattr(speed, "compile_obstacle", lambda device: "the annotations' checker is on")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in blocks("bash")[2].splitlines()]
    assert [c[1:3] for c in commands] == [["bench", "speed"]] * 2
    small = ["--tokens", "8", "--width", "8", "--vocab", "256", "--rounds", "1", "--threads", "1"]
    for command in commands:
        result = CliRunner().invoke(app, [*command[1:], *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"speed.json", "memory.json"}


@pytest.mark.slow
def test_commands_run_in_order(tmp_path, monkeypatch):
    """Noise, score, train: as written, in a copy of the files they name."""
    from typer.testing import CliRunner

    from qtarget.cli.app import app

    for folder in ("src/qtarget/data/embedded", "examples"):
        (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in blocks("bash")[1].splitlines()]
    assert [c[1] for c in commands] == ["noise", "score", "train", "train"]
    for command in commands:
        small = ["--max_steps", "4"] if command[1] == "train" else []
        result = CliRunner().invoke(app, [*command[1:], *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/noisy/asft/qtarget_config.yaml").exists()
    assert (tmp_path / "runs/noisy/sft/model.safetensors").exists()
