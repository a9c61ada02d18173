"""``qtarget audit-data``: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("typer")

from qtarget.cli.main import run
from qtarget.data.checks.findings import SEVERITIES


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    """Run in ``tmp_path``; exit code, JSON (None if not written) and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments: object):
        out = tmp_path / "audit.json"
        out.unlink(missing_ok=True)
        with pytest.raises(SystemExit) as ended:
            run(["audit-data", *map(str, arguments), "--json", str(out)])
        captured = capsys.readouterr()
        value = json.loads(out.read_text()) if out.exists() else None
        return ended.value.code, value, captured.out + captured.err

    return call


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_name(value) -> dict:
    return {found["check"]: found for found in value["findings"]}


def test_clean_rows_exit_with_0_and_say_what_was_not_checked(audit, workspace):
    code, value, printed = audit(workspace(max_length=64))
    assert code == 0
    assert {found["check"] for found in value["findings"]} == {"lengths", "base_unchecked"}
    assert value["errors"] == 0 and value["rows"] == 12
    assert value["which_target"]["verdict"] == "not enough evidence"
    assert "Which target? Not enough evidence" in printed
    assert "12 rows of rows.jsonl: no errors" in printed


def test_warnings_exit_with_0_and_errors_with_1(audit, workspace, tmp_path):
    config = workspace(max_length=64)
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(9)]
    write(tmp_path / "rows.jsonl", [*rows, rows[0], {"prompt": "1?", "completion": "[red]no[/red]"}])
    code, value, printed = audit(config)
    assert code == 0
    assert by_name(value)["duplicates"]["rows"] == [9]
    assert by_name(value)["contradictory_duplicates"]["rows"] == [1, 10]
    assert "'[red]no[/red]'" in printed  # text of the data is not taken for markup
    write(tmp_path / "rows.jsonl", [*rows, {"prompt": "x" * 70, "completion": "y"}])
    code, value, printed = audit(config)
    assert code == 1
    assert by_name(value)["cut_off"] | {"message": "", "evidence": {}} == {
        "check": "cut_off", "severity": "error", "count": 1, "rows": [9], "message": "", "evidence": {},
    }  # fmt: skip
    assert [f["severity"] for f in value["findings"]] == sorted(
        (f["severity"] for f in value["findings"]), key=SEVERITIES.index
    )
    assert "1 kind of errors" in printed
    assert audit(config, "--max_length", "128")[0] == 0  # an override, as in training


def test_a_cache_brings_surprise_and_a_changed_row_is_missing_from_it(audit, workspace, tmp_path, capsys):
    config = workspace(max_length=64, reference_cache=str(tmp_path / "base"))
    code, value, _ = audit(config)
    assert code == 0 and "base_unchecked" in by_name(value)  # not scored yet
    code, _, printed = audit(config, "--reference_cache", tmp_path / "nowhere")
    assert code == 2 and "there is no cache folder" in printed
    with pytest.raises(SystemExit):
        run(["score", str(config), "--top_k", "2"])
    code, value, _ = audit(config)
    found = by_name(value)
    assert code == 0 and found["base_surprise"]["count"] == 12
    assert found["base_surprise"]["evidence"]["labels"] == sum(len(str(i + 1)) + 1 for i in range(12))
    assert value["which_target"]["facts"]["favourite_share"] is not None
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    write(tmp_path / "rows.jsonl", [*rows[:11], {"prompt": "new", "completion": "row"}])
    code, value, _ = audit(config)
    assert code == 1
    coverage = by_name(value)["cache_coverage"]
    assert (coverage["severity"], coverage["count"], coverage["rows"]) == ("error", 1, [11])


def test_a_cache_of_another_tokenizer_is_an_error(audit, workspace, tmp_path, tiny_model):
    config = workspace(max_length=64, reference_cache=str(tmp_path / "base"))
    with pytest.raises(SystemExit):
        run(["score", str(config)])
    manifest = json.loads((tmp_path / "base/manifest.json").read_text())
    (tmp_path / "base/manifest.json").write_text(json.dumps(manifest | {"tokenizer_fingerprint": "other"}))
    code, value, _ = audit(config)
    assert code == 1
    assert "tokenizer_fingerprint is other" in by_name(value)["cache_mismatch"]["message"]


def test_a_file_of_rows_alone_and_with_a_model(audit, tmp_path, tiny_model):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": " "}]
    path = write(tmp_path / "rows.jsonl", rows)
    code, value, printed = audit(path)
    assert code == 0
    assert set(by_name(value)) == {"empty_answer", "contradictory_duplicates", "tokens_unchecked"}
    assert "--model_name_or_path" in printed
    code, value, _ = audit(path, "--model_name_or_path", tiny_model)
    assert code == 0
    assert by_name(value)["lengths"]["evidence"]["max"] == len("1+1=2") + 1
    code, _, printed = audit(path, "--max_length", "9")
    assert code == 2 and "--max_length says nothing" in printed


def test_the_files_of_a_pattern_are_named(audit, tmp_path, tiny_model):
    for name in ("a/train.jsonl", "b/train.jsonl"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path / name, [{"prompt": f"{name}?", "completion": "2"}])
    for model in ((), ("--model_name_or_path", tiny_model)):
        _, value, printed = audit("*/*.jsonl", *model)
        assert value["files"] == ["a/train.jsonl", "b/train.jsonl"]
        assert "2 rows of a/train.jsonl, b/train.jsonl: no errors" in printed
    before = (tmp_path / "a/train.jsonl").read_text()
    with pytest.raises(SystemExit) as ended:
        run(["audit-data", "*/*.jsonl", "--json", "a/train.jsonl", "--overwrite"])
    assert ended.value.code == 2 and (tmp_path / "a/train.jsonl").read_text() == before


def test_a_data_set_keeps_its_name(audit, workspace, tmp_path):
    (tmp_path / "org/data").mkdir(parents=True)
    write(tmp_path / "org/data/train.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    _, value, printed = audit(workspace(max_length=64, train_file=None, dataset_name="org/data"))
    assert value["files"] == ["org/data, split train"]
    assert "1 row of org/data, split train: no errors" in printed


@pytest.mark.parametrize("name", ["rows", "rows.jsonl"])
def test_a_folder_is_told_the_pattern_of_its_rows(audit, tmp_path, name, capsys):
    (tmp_path / name / "deep").mkdir(parents=True)
    write(tmp_path / name / "deep/A.JSONL", [{"prompt": "1+1=", "completion": "2"}])
    code, _, printed = audit(name)
    assert code == 2
    assert f"{name} is a folder; name its files by a pattern, for instance '{name}/**/*.JSONL'" in printed
    with pytest.raises(SystemExit):
        run(["filter", name])
    printed = capsys.readouterr().err
    assert f"{name} is a folder; the config comes first" in printed and f"`train_file: {name}/**/*.JSONL`" in printed


def test_the_validation_rows_on_request(audit, workspace):
    code, value, _ = audit(workspace(validation_file="held_out.jsonl"), "--split", "validation")
    assert (code, value["rows"]) == (0, 4)
    code, _, printed = audit(workspace(validation_file=...), "--split", "validation")
    assert code == 2 and "names no validation_file" in printed


def test_a_config_for_a_gpu_is_audited_without_one(audit, workspace):
    assert audit(workspace(bf16=True, use_cpu=False))[0] == 0


def test_unknown_keys_and_missing_files_are_explained(audit, workspace, tmp_path):
    code, _, printed = audit(workspace(), "--max_lenght", "9")
    assert code == 2 and "did you mean max_length?" in printed
    code, _, printed = audit(tmp_path / "none.jsonl")
    assert code == 2 and "is not a file" in printed
