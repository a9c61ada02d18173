"""docs/consensus.md: its example prints what it says, its config and commands run, and wrong uses of the guard say so."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.main import run
from tests import ROOT

PAGE = (ROOT / "docs/consensus.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_example_prints_what_it_says():
    (code,) = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert f"# {printed.getvalue()}" in code


def test_the_config_and_the_commands_run(workspace, tmp_path, tiny_model, monkeypatch):
    workspace()  # writes rows.jsonl
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").rename("noisy.jsonl")
    config, guard = blocks("yaml")
    (tmp_path / "consensus.yaml").write_text(config.replace("path/to/base", str(tiny_model)))
    (commands,) = blocks("sh")
    lines = [shlex.split(line) for line in commands.splitlines()]
    assert [line[:2] for line in lines] == [["qtarget", "train"], ["qtarget", "train"]]
    for line in lines:
        assert called(*line[1:]) == 0
    for folder, name in (("runs/consensus", "consensus"), ("runs/guarded", "guarded asft")):
        summary = json.loads((tmp_path / folder / "train_summary.json").read_text())
        assert (summary["target"], summary["steps"]) == (name, 8)
        assert summary["last_nll"] < summary["first_nll"]
        record = json.loads((tmp_path / folder / "qtarget_run.json").read_text())
        assert record["target"] == name
        saved = yaml.safe_load((tmp_path / folder / "qtarget_config.yaml").read_text())
        assert saved.get("guard", False) == (name == "guarded asft")
    assert len(list((tmp_path / "runs").glob("reference_cache-*/manifest.json"))) == 1
    keys = yaml.safe_load(guard)
    assert (keys["target"], keys["guard"]) == ("asft", True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "talr"], "'talr' weighs a whole batch"),
        (["--target", "distillation", "--teacher_cache", "cache"], "'distillation' never looks at the observed token"),
        (["--target", "dft", "--reference", "live"], "'guarded dft' weighs what the rows agree on against the frozen"),
        (["--target", "target_sft"], "run `qtarget score {config} --role teacher --teacher MODEL --output CACHE`"),
        (["--target", "asft", "--guard", "perhaps"], "guard"),
    ],
)
def test_wrong_uses_of_the_guard_say_what_and_how(workspace, capsys, options, words):
    config = workspace(guard=True)
    assert called("train", config, *options) == 2
    errors = capsys.readouterr().err
    assert words.format(config=config) in " ".join(errors.split())
    assert "Traceback" not in errors
