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


def test_pages_are_what_their_script_writes():
    """Examples, table and numbers come from the files they are about."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from update_docs import render
    finally:
        sys.path.pop(0)
    for page, text in render().items():
        assert (ROOT / page).read_text() == text, page


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 130


def test_numbers_in_the_text_are_those_of_the_raw_results():
    noise = json.loads((ROOT / "benchmarks/results/noise.json").read_text())
    goals = noise["summary"]["goals"]
    noisy = [g for g in goals if g["rate"] and g["base"] != "untrained"]
    assert len(noisy) == 12
    over = [g["ours"] - g["sft"] for g in noisy]
    assert (round(min(over), 1), round(max(over))) == (-0.1, 22)
    means = {
        (cell["base"], cell["kind"], cell["rate"]): {
            n: m["accuracy_percent"]["mean"] for n, m in cell["methods"].items()
        }
        for cell in noise["summary"]["cells"]
    }
    end = means["most", "random_tokens", 0.4]
    assert [round(end[name]) for name in ("target_sft", "asft", "sft")] == [69, 64, 43]
    assert means["none", "random_tokens", 0.4]["target_sft"] == means["none", "random_tokens", 0.4]["asft"] == 0
    # 1 - p_base: below sft at every point but the one without noise tokens where they tie within a point
    assert all(cell["prior_surprise"] < cell["sft"] for cell in means.values())


def test_the_python_start_runs(tmp_path):
    [code] = blocks("python")
    assert len(code.splitlines()) <= 8
    short = code.replace("bf16=False)", "bf16=False, max_steps=3)")
    assert short != code
    done = subprocess.run([sys.executable, "-c", short], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/first").is_dir()


@pytest.mark.slow
def test_a_verdict_on_rows(tmp_path, monkeypatch):
    """As written, but for the size."""
    from typer.testing import CliRunner

    from qtarget.cli.app import app
    from qtarget.data.embedded import base_model_path, load_demonstrations

    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(base_model_path())
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in load_demonstrations("train")[:80]))
    few = ["--max_steps", "2"]
    small = {"compare": [*few, "--seeds", "1", "--rates", "1", "--at-once", "1", "--max-new-tokens", "4"], "train": few}
    commands = [shlex.split(line, comments=True) for line in blocks("bash")[2].splitlines()]
    assert [command[1] for command in commands] == ["init", "compare", "train"]
    for command in commands:
        done = CliRunner().invoke(app, [*command[1:], *small.get(command[1], [])], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    [page] = tmp_path.glob("runs/run/*-compare/comparison.html")
    assert "sft" in page.read_text()
    assert (tmp_path / "runs/run/consensus/model.safetensors").is_file()


def test_the_yaml_start_has_keys_that_are_there(tmp_path, monkeypatch):
    from qtarget.cli.options.config import load_config
    from qtarget.data.embedded import base_model_path

    [text] = blocks("yaml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/base").symlink_to(base_model_path())
    for name in ("run.yaml", "run.train.jsonl", "run.validation.jsonl"):
        (tmp_path / name).write_text(text)
    config = load_config(tmp_path / "run.yaml", ["--use_cpu", "true", "--bf16", "false"])
    assert (config.training.target, config.training.filter, config.training.learning_rate) == (
        "consensus",
        "auto",
        1e-3,
    )


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = [line.split("#")[0].split() for line in blocks("bash")[1].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for name in ("demo", "test", "docs"))


@pytest.mark.slow
def test_benchmark_commands_run(tmp_path, monkeypatch):
    """Of docs/performance.md, as written, but for the size."""
    from typer.testing import CliRunner

    from qtarget.benchmarks.speed import losses as speed
    from qtarget.benchmarks.speed import memory
    from qtarget.cli.app import app

    monkeypatch.setattr(memory, "MEMORY", ("sft",))
    monkeypatch.setattr(speed, "compile_obstacle", lambda device: "the annotations' checker is on")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/performance.md").read_text()
    [block] = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [c[1:3] for c in commands] == [["bench", "speed"]] * 2
    small = ["--tokens", "8", "--width", "8", "--vocab", "256", "--rounds", "1", "--threads", "1"]
    for command in commands:
        result = CliRunner().invoke(app, [*command[1:], *small], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"speed.json", "memory.json"}
