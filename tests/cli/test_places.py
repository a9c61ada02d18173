"""Where verbs write by default, and what they never replace unasked."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("typer")

from tests.cli.test_train import qtarget, refused


def last_line(capsys) -> str:
    return capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)[-1]


@pytest.fixture
def trained(workspace, tmp_path, monkeypatch):
    """A run in ``runs/a``, beside its config; the current folder is another."""
    config = workspace(validation_file="held_out.jsonl", output_dir=str(tmp_path / "runs/a"), max_steps=2)
    qtarget("train", config)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return config


def test_pages_of_a_run_lie_beside_it_and_replace_only_their_like(trained, tmp_path, capsys):
    """One rule for all verbs; the same input again is replaced, another's file is not."""
    runs, quick = tmp_path / "runs", ("--no-generate", "--base", "../runs/a")
    verbs = {
        "report": ((), ["a-report.html"]),
        "inspect": (("--no-audit",), ["a-inspect.html"]),
        "evaluate": (quick, ["a-evaluation.json", "a-evaluation.html", "a-evaluation.rows.jsonl"]),
    }
    for verb, (options, names) in verbs.items():
        qtarget(verb, "../runs/a", *options)
        wrote = "wrote " + ", ".join(f"../runs/{name}" for name in names)
        assert wrote in capsys.readouterr().out.splitlines()
    assert not list((tmp_path / "here").iterdir())
    assert {path.name for path in runs.iterdir()} == {"a", *(name for _, names in verbs.values() for name in names)}
    page = (runs / "a-inspect.html").read_text()
    assert str(tmp_path) not in page[:400], "a page tells nothing of the machine"

    qtarget("report", runs / "a")  # another spelling of one run
    qtarget("inspect", trained, "--no-audit")  # the config of the run
    qtarget("evaluate", "../runs/a", *quick, "--resume")
    before = {path: path.read_bytes() for path in runs.glob("a-*")}
    shutil.copytree(runs / "a", runs / "b")
    for verb, (options, names) in verbs.items():
        said = refused(capsys, verb, "../runs/b", *options, "--output", runs / names[0])
        assert "--overwrite" in said and names[0].split(".")[0] in said
    assert "`qtarget report` did not make it of this input" in refused(
        capsys, "report", runs / "a", runs / "b", "--output", runs / "a-report.html"
    )
    assert "`qtarget report` did not make it" in refused(
        capsys, "report", runs / "a", "--json", runs / "a-evaluation.json"
    )
    assert before == {path: path.read_bytes() for path in runs.glob("a-*")}
    qtarget("report", runs / "b", "--output", runs / "a-report.html", "--overwrite")
    assert (runs / "a-report.html").read_bytes() != before[runs / "a-report.html"]
    qtarget("report", runs / "a", runs / "b")
    assert last_line(capsys) == f"wrote {runs}/a+b-report.html"


def test_a_run_is_inspected_with_its_own_config_before_and_after(trained, tmp_path, capsys):
    """Its rows under its target: ten were trained, and the two views are the start and the run's model."""
    qtarget("inspect", tmp_path / "runs/a", "--target", "dft", "--json", "page.json")
    assert last_line(capsys) == f"wrote {tmp_path}/runs/a-inspect.html, page.json"
    page = json.loads((tmp_path / "here/page.json").read_text())
    assert [view["model"] for view in page["views"]][1:] == ["a"] and len(page["views"]) == 2
    assert page["targets"] == ["sft", "dft"]
    assert len(page["rows"]) == 12
    first, last = ([view["log_prob"] for view in row["views"]] for row in (page["rows"][0], page["rows"][-1]))
    assert first[0] != first[1] and last[0] != last[1]
    (tmp_path / "empty").mkdir()
    assert "holds neither qtarget_config.yaml nor qtarget_rollouts.jsonl" in refused(capsys, "inspect", "../empty")


def test_without_a_run_files_are_named_after_what_they_are_of(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    qtarget("lens", "sft", "--png", "a.png")
    assert last_line(capsys) == "wrote sft-lens.html, a.png"
    qtarget("lens", "sft", "--png", "a.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for option in ("--png", "--output", "--json"):
        assert "did not make it of this input" in refused(
            capsys, "lens", "dft", option, "a.png" if option == "--png" else "sft-lens.html"
        )
    (tmp_path / "mine.json").write_text('{"mine": 1}\n')
    assert "did not make it" in refused(capsys, "lens", "sft", "--json", "mine.json")
    assert before | {"mine.json": b'{"mine": 1}\n'} == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    qtarget("lens", "dft", "--png", "a.png", "--json", "mine.json", "--overwrite")
    assert (tmp_path / "a.png").read_bytes() != before["a.png"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    qtarget("audit-data", "rows.jsonl", "--json", "found.json")
    assert last_line(capsys) == "wrote found.json"
    assert "did not make it" in refused(capsys, "audit-data", "rows.jsonl", "--json", "mine.json")


def test_filtered_rows_of_another_config_stay(workspace, tmp_path, capsys):
    config, folder = workspace(), tmp_path / "out-filtered"
    folder.mkdir()
    (folder / ".qtarget").write_text('{"kind": "filter"}')
    (folder / "filter.json").write_text('{\n "made_by": "qtarget filter of 0123"\n}\n')
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert "`qtarget filter` did not make it of this input" in refused(capsys, "filter", config)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
