"""``qtarget convert``: what it writes is what training takes, and nothing of the user's is written over."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")

from qtarget.cli.main import run

SHARED = [{"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}]
READ = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def call(*arguments):
    with pytest.raises(SystemExit) as ended:
        run(["convert", *map(str, arguments)])
    return ended.value.code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_written_as_they_are_trained(tmp_path, capsys):
    source, out = write(tmp_path / "a.jsonl", SHARED * 2), tmp_path / "new" / "out.jsonl"
    assert call(source, out) == 0
    assert lines(out) == [READ, READ]
    said = capsys.readouterr().out
    for words in (
        "read 2 rows as sharegpt: conversations -> messages",
        "2 rows: role gpt -> assistant",
        "out.jsonl: 2 rows",
    ):
        assert words in said


def test_several_files_tools_roles_and_rows_without_content(tmp_path, capsys):
    write(
        tmp_path / "a1.jsonl",
        [{"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}],
    )
    write(
        tmp_path / "a2.jsonl",
        [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]}],
    )
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "f", "parameters": {}}]))
    out = tmp_path / "out.jsonl"
    given = ["--tools", tools, "--null-content", "drop", "--role", "narrator=user"]
    assert call(tmp_path / "a?.jsonl", out, *given) == 0
    (row,) = lines(out)
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert row["tools"] == [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert "read 2 files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}", "{a}"], "which is read here"),
        (["{a}", "{there}"], "exists; choose another OUT"),
        (["{a}"], "only"),
        (["{a}", "{d}/out.json"], "ends in .jsonl"),
        (["{a}", "{d}/out.jsonl", "--format", "alpacca"], "did you mean 'alpaca'"),
        (["{a}", "{d}/out.jsonl", "--format", "alpaca"], "not a row of format alpaca"),
        (["{a}", "{d}/out.jsonl", "--null-content", "maybe"], "expected refuse or drop"),
        (["{a}", "{d}/out.jsonl", "--role", "narrator"], "THEIRS=OURS"),
        (["{a}", "{d}/out.jsonl", "--tools", "{d}/none.json"], "none.json"),
        (["{a}", "{d}/out.jsonl", "--tools", "{a}"], "expected a JSON list of tool schemas"),
        (["{d}/none.jsonl", "{d}/out.jsonl"], "is not a file"),
    ],
)
def test_what_is_refused_leaves_every_file_as_it_was(tmp_path, capsys, arguments, words):
    source = write(tmp_path / "a.jsonl", SHARED)
    there = write(tmp_path / "there.jsonl", [{"text": "mine"}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert call(*(a.format(a=source, d=tmp_path, there=there) for a in arguments)) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_replaces(tmp_path):
    source, out = write(tmp_path / "a.jsonl", SHARED), tmp_path / "out.jsonl"
    out.write_text("old")
    assert call(source, out, "--overwrite") == 0
    assert lines(out) == [READ]
