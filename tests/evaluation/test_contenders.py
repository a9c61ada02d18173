"""Who is compared with what, from folders alone."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import ConfigError
from qtarget.evaluation.contenders import Contender, find_contenders, recorded_rows, weights_digest
from qtarget.integrations.shared.checkpoints import COMPLETE_MARK


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def model(name, kind="config.json", **content):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / kind).write_text(json.dumps(content))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    def run(name, base="base", final=True, steps=(2, 4), complete=(2, 4), record="config"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for step in steps:
            made = model(f"{name}/checkpoint-{step}")
            if step in complete:
                (made / COMPLETE_MARK).touch()
        if final:
            model(name)
        if record == "config":
            (folder / "qtarget_config.yaml").write_text(f"model_name_or_path: {tmp_path / base}\nmax_length: 9\n")
        else:
            record = {"settings": {"max_length": 9}, "model": {"name": str(tmp_path / base)}}
            (folder / "qtarget_run.json").write_text(json.dumps(record))
        return folder

    model("base")
    return model, run


def test_the_base_comes_first_and_once(folders, tmp_path):
    _, run = folders
    run("runs/a")
    run("runs/b", record="run")
    found = find_contenders(["runs/a", "runs/b/"])
    assert [(one.name, one.base) for one in found] == [
        ("base", None), ("runs/a", str(tmp_path / "base")), ("runs/b", str(tmp_path / "base")),
    ]  # fmt: skip
    assert [one.settings["max_length"] for one in found] == [9, 9, 9]
    assert found[0].tokenizer == "runs/a"
    assert [one.name for one in find_contenders(["base", "runs/a"])] == ["base", "runs/a"]


def test_a_run_without_a_final_model_is_its_newest_whole_checkpoint(folders):
    _, run = folders
    run("cut", final=False, complete=(2,))
    run("others", final=False, complete=())
    cut, others = find_contenders(["cut", "others"])[1:]
    assert (cut.model, others.model) == ("cut/checkpoint-2", "others/checkpoint-4")
    assert "checkpoint-2" in cut.notes[0]


def test_a_checkpoint_knows_its_run(folders, tmp_path):
    _, run = folders
    run("a")
    base, one = find_contenders(["a/checkpoint-2"])
    assert (base.model, one.base, one.settings["max_length"]) == (str(tmp_path / "base"), str(tmp_path / "base"), 9)


def test_an_adapter_names_its_base_and_another_may_be_given(folders):
    model, _ = folders
    model("adapter", "adapter_config.json", base_model_name_or_path="base")
    model("moved")
    assert [(one.name, one.base) for one in find_contenders(["adapter"])] == [("base", None), ("adapter", "base")]
    assert [(one.name, one.base) for one in find_contenders(["adapter"], "moved")] == [
        ("moved", None), ("adapter", "moved")]  # fmt: skip


def test_a_base_alone_and_hub_names(folders):
    assert [(one.name, one.base) for one in find_contenders(["base"], "base")] == [("base", None)]
    assert [(one.name, one.base) for one in find_contenders(["org/tuned"], "org/base")] == [
        ("base", None), ("org/tuned", "org/base")]  # fmt: skip


def test_what_is_refused(folders, tmp_path):
    model, run = folders
    run("runs/a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    broken = run("broken")
    (broken / "qtarget_config.yaml").write_text("a: [")
    model("moved", "adapter_config.json", base_model_name_or_path="/gone/base")
    for names, base, part in [
        (["moved"], None, "the base of moved: there is no folder /gone/base; .*; if it has moved, pass --base MODEL"),
        (["base"], None, r"--base base evaluates it alone"),
        (["runs/ab"], None, r"RUN_OR_MODEL: there is no folder runs/ab in .*; did you mean runs/a\?"),
        (["./none"], None, "there is no folder ./none"),
        (["runs/a"], "/nowhere/base", "--base: there is no folder /nowhere/base; "),
        (["runs/a", "runs/../runs/a"], None, "are one model"),
        (["empty"], None, "holds neither a model"),
        (["file"], None, "is a file"),
        (["broken"], None, "record cannot be read"),
    ]:
        with pytest.raises(ConfigError, match=part):
            find_contenders(names, base)


def test_the_digest_of_weights_tells_a_retrained_model(folders):
    model, _ = folders
    folder = model("m")
    (one,) = find_contenders(["m"], "m")
    first = weights_digest(one)
    (folder / "model.safetensors").write_bytes(b"1")
    assert weights_digest(one) != first


def test_the_rows_that_the_runs_record():
    def one(name, **settings):
        return Contender(name, name, name, settings=settings)

    runs = [one("base"), one("a", validation_file="v.jsonl"), one("b", validation_file="v.jsonl")]
    assert str(recorded_rows(runs)) == "v.jsonl"
    with pytest.raises(ConfigError, match=r"record several, v.jsonl, w.jsonl; pass --data ROWS"):
        recorded_rows([*runs, one("c", validation_file="w.jsonl")])
    with pytest.raises(ConfigError, match="record none; pass --data ROWS"):
        recorded_rows(runs[:1])
    with pytest.raises(ConfigError, match=r"several, v.jsonl, w.jsonl"):
        recorded_rows([one("d", validation_file=["v.jsonl", "w.jsonl"])])
