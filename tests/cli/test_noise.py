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


@pytest.mark.parametrize("name", ["noisy.txt", "noisy.jsonl.gz"])
def test_a_name_that_no_verb_reads_is_refused_before_work(rows, tmp_path, capsys, name):
    assert called("noise", rows, name, *INJECT) == 2
    assert f"OUTPUT is {name}; expected a name that ends in .jsonl or .ndjson" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["noisy.ndjson", "NOISY.JSONL"])
def test_every_name_of_json_lines_is_taken(rows, tmp_path, name):
    assert called("noise", rows, name, *INJECT, "--null_content", "drop") == 0
    assert len((tmp_path / name).read_text().splitlines()) == 3


def test_a_row_without_a_response_is_named_with_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, row in (("a", {"prompt": "q", "completion": "x"}), ("b", {"text": "x"})):
        (tmp_path / f"{name}.jsonl").write_text(f"\n{json.dumps(row)}\n")
    assert called("noise", "b.jsonl", "noisy.jsonl", *INJECT) == 2
    assert "b.jsonl, line 2: row with columns ['text'] has no response" in capsys.readouterr().err


def test_no_file_of_a_pattern_is_written_over(rows, tmp_path, capsys):
    before = rows.read_text()
    assert called("noise", "*.jsonl", "rows.jsonl", *INJECT, "--null_content", "drop", "--overwrite") == 2
    assert "OUTPUT" in capsys.readouterr().err
    assert rows.read_text() == before


def test_rows_without_any_text_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": ""}\n')
    assert called("noise", "rows.jsonl", "noisy.jsonl", *INJECT) == 2
    assert "all responses are empty, or a call alone" in capsys.readouterr().err
    assert not (tmp_path / "noisy.jsonl").exists()
