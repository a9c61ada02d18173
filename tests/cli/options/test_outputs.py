"""No verb writes over what it reads, nor two results into one file."""

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("typer")

from qtarget.cli.options.outputs import check_outputs
from qtarget.core.errors import ConfigError
from tests.cli.test_train import refused


def test_paths_are_compared_as_the_file_system_sees_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    rows.write_text("{}")
    cache.mkdir()
    (tmp_path / "link").symlink_to(rows)
    for output in ("rows.jsonl", "cache/../rows.jsonl", "link", "cache/page.html"):
        with pytest.raises(ConfigError, match="which is read here"):
            check_outputs({"--json": tmp_path / output}, [os.path.relpath(rows), cache, None, "owner/name"])
    with pytest.raises(ConfigError, match="--output and --json are both"):
        check_outputs({"--output": tmp_path / "a.html", "--png": None, "--json": tmp_path / "cache/../a.html"})
    with pytest.raises(ConfigError, match=r"--json .* is a folder"):
        check_outputs({"--json": cache})
    with pytest.raises(ConfigError, match=r"--json .* cannot be written"):
        check_outputs({"--json": rows / "page.json"})
    (tmp_path / "nowhere").symlink_to(tmp_path / "new/b.html")
    check_outputs({"--output": tmp_path / "nowhere"})
    assert (tmp_path / "nowhere").is_symlink()
    check_outputs({"--output": tmp_path / "new/a.html", "--json": tmp_path / "new/a.json"}, [rows, cache])
    assert rows.read_text() == "{}" and not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        (["audit-data", "run.yaml"], ["--json", "run.yaml"], "run.yaml, which is read"),
        (["audit-data", "run.yaml"], ["--json", "rows.jsonl"], "rows.jsonl, which is read"),
        (["audit-data", "rows.jsonl"], ["--json", "rows.jsonl"], "rows.jsonl, which is read"),
        (["inspect", "run.yaml"], ["--output", "rows.jsonl"], "rows.jsonl, which is read"),
        (["inspect", "run.yaml"], ["--output", "a.html", "--json", "./a.html"], "are both"),
        (["report", "."], ["--output", "qtarget_log.jsonl"], "qtarget_log.jsonl, which is read"),
        (["report", ".", "--rows", "rows.jsonl"], ["--json", "rows.jsonl"], "rows.jsonl, which is read"),
        (["report", "."], ["--output", "a.html", "--json", "a.html"], "are both"),
        (["lens", "sft"], ["--output", "a.html", "--json", "a.html"], "are both"),
        (["noise", "rows.jsonl", "rows.jsonl", "--kind", "wrong_answer", "--rate", "0.5"], ["--overwrite"], "is read"),
    ],
)
def test_every_verb_refuses(verb, options, words, workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace()
    (tmp_path / "qtarget_log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert words in refused(capsys, *verb, *options)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
