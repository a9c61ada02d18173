"""The commands of `docs/compare.md`, with fewer steps, and its YAML."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.options.contenders import find_contenders
from tests import ROOT
from tests.cli.test_train import qtarget

TEXT = (ROOT / "docs/compare.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.nightly
def test_commands(tmp_path, monkeypatch):
    for part in ("examples", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    noise, first, more = commands()
    qtarget(*noise[1:])
    rows = Path("runs/noisy/train.jsonl").read_text().splitlines()[:120]
    Path("runs/noisy/train.jsonl").write_text("\n".join(rows) + "\n")
    tests = (ROOT / "src/qtarget/data/embedded/demonstrations/test.jsonl").read_text().splitlines()[:12]
    Path("few.jsonl").write_text("\n".join(tests) + "\n")
    quick = ("--max_steps", "2", "--validation_file", "few.jsonl", "--seeds", "1", "--rates", "1", "--at-once", "1")
    for command in (first, more):
        qtarget(*command[1:], *quick)
    document = json.loads(Path("runs/noisy/compare/comparison.json").read_text())
    assert [one["name"] for one in document["contenders"]] == [
        "sft",
        "consensus",
        "dft",
        "label_smoothing(smoothing=0.2)",
    ]
    assert Path("runs/noisy/compare/comparison.html").is_file()


def test_the_list_of_contenders():
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    names = [one.name for one in find_contenders(yaml.safe_load(block)["compare"], ["none"], {"target": "sft"})]
    assert names[:3] == ["sft", "consensus", "noisy embeddings"] and names[3].startswith("dft (filter=")
