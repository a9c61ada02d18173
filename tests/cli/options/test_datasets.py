"""The rows that a config names: several files, keys that say how they are read, validation kept apart from training."""

from __future__ import annotations

import json

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.options.config import load_config
from qtarget.cli.options.datasets import load_datasets
from qtarget.core.errors import ConfigError


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def load(folder, **settings):
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump({"model_name_or_path": "m", "output_dir": str(folder / "out"), "bf16": False, **settings})
    )
    return load_config(path)


def test_lists_and_patterns_are_looked_up_beside_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for name in "ab":
        rows(tmp_path / f"{name}.jsonl", name)
    for given in (["a.jsonl", "b.jsonl"], "*.jsonl", ["?.jsonl"]):
        config = load(tmp_path, train_file=given)
        train, _ = load_datasets(config)
        assert list(train["text"]) == ["a", "b"]
        assert {str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")} <= set(config.inputs)


def test_a_file_that_is_trained_does_not_validate(tmp_path):
    rows(tmp_path / "a.jsonl", "a")
    rows(tmp_path / "b.jsonl", "b")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for train, validation in (("a.jsonl", "a.jsonl"), (["a.jsonl", "b.jsonl"], "link.jsonl"), ("?.jsonl", ["b.jsonl"])):
        with pytest.raises(ConfigError, match="is train_file too"):
            load_datasets(load(tmp_path, train_file=train, validation_file=validation))


def test_rows_that_are_in_both_are_named(tmp_path, caplog):
    rows(tmp_path / "a.jsonl", "a", "b", "c")
    rows(tmp_path / "v.jsonl", "x", "c")
    load_datasets(load(tmp_path, train_file="a.jsonl", validation_file="v.jsonl"))
    assert "1 of 2 validation rows is a training row too: validation row 2 is training row 3" in caplog.text


def test_keys_that_say_how_rows_are_read(tmp_path):
    talk = [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]
    empty = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]
    text = "".join(json.dumps({"messages": m, "instruction": "a", "output": "b"}) + "\n" for m in (talk, empty))
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "f"}]))
    keys = {"roles": {"narrator": "user"}, "null_content": "drop", "tools_file": "tools.json"}
    train, _ = load_datasets(load(tmp_path, train_file="a.jsonl", **keys))
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant"]
    assert list(train["tools"]) == [[{"type": "function", "function": {"name": "f"}}]]
    train, _ = load_datasets(load(tmp_path, train_file="a.jsonl", data_format="alpaca"))
    assert list(train["completion"]) == [[{"role": "assistant", "content": "b"}]] * 2
