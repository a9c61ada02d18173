"""The README says what the code does: its table, its examples and its commands."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_table_lists_every_target():
    from qtarget.cli.targets import target_rows

    for row in target_rows():
        formula = row["formula"].replace("|", "\\|")
        line = f"| `{row['name']}` | `{formula}` | {', '.join(row['needs']) or '-'} | {row['paper']} |"
        assert line in README


def test_python_blocks_are_the_examples_or_run():
    trl, core = blocks("python")
    assert trl.strip() == (ROOT / "examples/train_with_trl.py").read_text().strip()
    done = subprocess.run([sys.executable, "-c", core], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "True" in done.stdout


def test_yaml_block_is_the_example():
    (block,) = blocks("yaml")
    example = (ROOT / "examples/noisy.yaml").read_text()
    assert block.strip() in example


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = [line.split("#")[0].split() for line in blocks("bash")[0].splitlines()]
    assert commands == [["make", "demo"], ["make", "test"]]
    assert all(re.search(rf"^{name}:", makefile, flags=re.MULTILINE) for _, name in commands)


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
