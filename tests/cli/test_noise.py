"""`qtarget noise` by the command line: what is asked for is written, or refused before work."""

from __future__ import annotations

import json

import pytest

from qtarget.cli.main import run

INJECT = ("--kind", "boilerplate", "--rate", "0.5")


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = ["a b", None, "", "c d"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"instruction": "q", "output": output}) + "\n" for output in outputs))
    return path


def test_the_way_out_that_is_named_is_one(rows, tmp_path, capsys):
    assert called("noise", rows, "noisy.jsonl", *INJECT) == 2
    assert "line 2: 'output' is there but holds no value" in capsys.readouterr().err
    assert called("noise", rows, "noisy.jsonl", *INJECT, "--null_content", "drop") == 0
    assert "noisy.jsonl: 3 rows, 1 with noise" in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "noisy.jsonl").read_text().splitlines()]
    assert written[1]["completion"][0]["content"] == "" and written[1]["noise_spans"] == []


def test_a_name_that_no_verb_reads_is_refused_before_work(rows, tmp_path, capsys):
    assert called("noise", rows, "noisy.txt", *INJECT) == 2
    assert "OUTPUT is noisy.txt; expected a name that ends in .jsonl" in capsys.readouterr().err
    assert not (tmp_path / "noisy.txt").exists()
