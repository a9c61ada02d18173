"""docs/start.md: its commands run as they stand there."""

from __future__ import annotations

import json
import re
import shlex

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.cli.options.settings import parse_yaml
from qtarget.data.embedded import base_model_path, load_demonstrations
from tests import ROOT

PAGE = (ROOT / "docs/start.md").read_text()


def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in load_demonstrations("train")[:48]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = [
        shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
    ]
    assert [command[1] for command in commands] == ["init", "train", "train", "train", "init"]
    for command in commands:
        steps = ["--max_steps", "1"] if command[1] == "train" else []
        with pytest.raises(SystemExit) as ended:
            run([str(base_model_path()) if part == "path/to/base" else part for part in command[1:]] + steps)
        assert ended.value.code == 0, command
    assert len(list((tmp_path / "runs/run").glob("reference_cache-*/manifest.json"))) == 1
    text = (tmp_path / "run.yaml").read_text()
    assert 8 <= len([line for line in text.splitlines() if not line.startswith("#")]) <= 14
    assert parse_yaml((tmp_path / "short.yaml").read_text())["max_length"] == 64


def test_the_keys_exist():
    from qtarget.integrations.sft.config import QTargetConfig

    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert all(hasattr(QTargetConfig, key) for key in parse_yaml(block))
