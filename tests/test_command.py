"""Commands that messages print: config and overrides of the command line that printed them, quoted, each key once."""

from __future__ import annotations

import shlex

from qtarget.command import CALLED_AS, PLACEHOLDER, called_as, command_for, forget, remember


def test_a_training_keeps_what_a_scoring_leaves_out():
    remember(
        "my run.yaml",
        ["--num_train_epochs", "3", "--lora_target_modules", "q", "v", "--filter=auto", "--resume", "true"],
    )
    same = ["my run.yaml", "--num_train_epochs", "3", "--lora_target_modules", "q", "v"]
    assert shlex.split(command_for("train", "--target", "dft")) == [
        "qtarget",
        "train",
        *same,
        "--filter=auto",
        "--target",
        "dft",
    ]
    assert shlex.split(command_for("train", "--filter", "none")) == ["qtarget", "train", *same, "--filter", "none"], (
        "each key once"
    )
    assert shlex.split(command_for("score")) == ["qtarget", "score", "my run.yaml", "--lora_target_modules", "q", "v"]


def test_a_process_that_works_for_another_speaks_of_the_others_command(monkeypatch):
    remember("my run.yaml", ["--seed", "3"])
    monkeypatch.setenv(CALLED_AS, called_as()[CALLED_AS])
    remember("/tmp/of-the-child.yaml")
    assert command_for("score") == "qtarget score 'my run.yaml' --seed 3"


def test_a_library_call_after_a_command_line_names_no_config():
    remember("run.yaml")
    forget()
    assert command_for("score") == f"qtarget score {PLACEHOLDER}"
