"""docs/custom_targets.md: its commands run in one folder, one after the other, and its table has every line of the contract."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.data.embedded import base_model_path
from tests import ROOT

PAGE = (ROOT / "docs" / "custom_targets.md").read_text(encoding="utf-8")
ROWS = ROOT / "src" / "qtarget" / "data" / "embedded" / "demonstrations"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.nightly
def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_target", raising=False)
    (tmp_path / "base").symlink_to(base_model_path())
    for name, source in (("rows", "train"), ("test", "test")):
        lines = (ROWS / f"{source}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    seen = []
    for command in (shlex.split(line) for block in blocks("bash") for line in block.splitlines()):
        seen.append(command[1])
        if command[0] == "pytest":
            ended = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stdout
            continue
        quick = {"train": ["--max_steps", "2"], "evaluate": ["--limit", "4", "--max-new-tokens", "4"]}
        with pytest.raises(SystemExit) as ended:
            run([*command[1:], *quick.get(command[1], [])])
        assert ended.value.code == 0, (command, capsys.readouterr().err)
    assert seen == ["targets", "-q", "targets", "lens", "inspect", "train", "train", "evaluate"]
    said = capsys.readouterr().out
    assert "floor: 0.5  f in [0, 1]" in said and "a = 0.5 + 0.5 p_y" in said
    assert "my_target:MyTarget(floor=0.2)" in (tmp_path / "inspect.html").read_text()
    shutil.rmtree(tmp_path / "runs")


def test_the_class_on_the_page_is_the_one_that_is_written(tmp_path, monkeypatch):
    """But for comments, docstrings and the check of the range."""
    import qtarget

    space: dict = {}
    exec(blocks("python")[0], space)
    qtarget.check_target(space["MyTarget"]())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_target", raising=False)
    with pytest.raises(SystemExit):
        run(["targets", "new", "my_target"])
    written = qtarget.get_target("my_target:MyTarget")
    import torch

    z, y = torch.randn(4, 9), torch.arange(4)
    assert torch.equal(qtarget.target_loss(z, y, written), qtarget.target_loss(z, y, space["MyTarget"]()))
    assert written.formula == space["MyTarget"].formula


def test_every_line_of_the_contract_is_on_the_page():
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "src/qtarget/contract").glob("*.py"))
        if path != Path()
    )
    lines = set(re.findall(r'broken\(\s*target,\s*"(\w+)"', source))
    assert lines == set(re.findall(r"^\| `(\w+)` \| (?!`x)", PAGE.partition("## The contract")[2], flags=re.MULTILINE))
