"""Each recipe's commands run from its README, shortened, and do what the README says; each has the four parts."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("trl")

from tests import ROOT
from tests.cli.test_train import qtarget

RECIPES = sorted(path.parent.name for path in (ROOT / "examples").glob("*/README.md"))


def commands(name: str) -> list[list[str]]:
    text = (ROOT / "examples" / name / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_goal_command_time_and_result(name):
    text = (ROOT / "examples" / name / "README.md").read_text()
    assert "@@" not in text
    for part in ("Goal: ", "```bash\n", "Time: ", "Expected: ", " .. "):
        assert part in text, part


def test_examples_are_recipes():
    assert sorted(path.name for path in (ROOT / "examples").iterdir() if not path.name.startswith("__")) == RECIPES


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    for part in ("examples", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {
    "train": ["--max_steps", "2", "--eval_strategy", "no", "--eval_on_start", "false"],
    "rl": ["--max_steps", "2", "--per_device_train_batch_size", "8", "--max_completion_length", "4"],
    "evaluate": ["--limit", "4", "--max-new-tokens", "4"],
    "compare": ["--seeds", "1", "--rates", "1", "--max_steps", "2", "--at-once", "1", "--max-new-tokens", "4"],
}
"""What a test adds to a command, so that it takes seconds."""


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("watch", "runs/live/report.html"),
        ("noisy_sft", "runs/noisy/evaluation.html"),
        ("own_target", "runs/own_target/evaluation.html"),
        ("rl", "runs/rl/report.html"),
        pytest.param("compare", "runs/compare/verdict/comparison.html", marks=pytest.mark.nightly),
    ],
)
def test_commands_of_a_recipe_run_in_order(name, result, checkout):
    for program, *given in commands(name):
        if program == "pytest":
            done = subprocess.run(
                [sys.executable, "-m", program, *given], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout
        else:
            qtarget(*given, *SMALL.get(given[0], []))
    assert (checkout / result).is_file()


def test_the_reward_of_the_rl_recipe():
    from examples.rl.rewards import in_brackets

    texts = ["The largest number is [7].", "[8] [7]", "It is 7.", "[7", "[ 7]"]
    assert in_brackets(texts, ["7"] * 5) == [1, 0, 0, 0, 0]


def test_lora_with_packing(tmp_path, checkout):
    train, merge = commands("lora_packing")
    qtarget(*train[1:], "--max_steps", "4", "--num_train_epochs", "1")
    qtarget(*merge[1:])
    assert (tmp_path / "runs/lora_packing-merged/model.safetensors").is_file()


def test_distillation(tmp_path, checkout):
    for command in commands("distillation"):
        small = {
            "train": ["--max_steps", "2", "--eval_strategy", "no"],
            "evaluate": ["--limit", "8", "--max-new-tokens", "4"],
        }
        given = shlex.split(shlex.join(command).replace(" --max_steps 250", ""))
        qtarget(*given[1:], *small.get(command[1], []))
    assert len(list(tmp_path.glob("runs/distillation/teacher_cache-*/manifest.json"))) == 1
    names = [
        one["name"] for one in json.loads((tmp_path / "runs/distillation/evaluation.json").read_text())["contenders"]
    ]
    assert names[1:] == [f"runs/distillation/{name}" for name in ("teacher", "student", "sft")]


@pytest.mark.nightly
def test_a_plain_loop():
    (line,) = commands("plain_pytorch")
    done = subprocess.run(
        [sys.executable, *line[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    name, before, after = re.findall(r"^(\S+): held-out nll, nats a token: ([\d.]+) -> ([\d.]+)$", done.stdout, re.M)[0]
    assert name == line[-1] and float(after) < float(before) / 3
