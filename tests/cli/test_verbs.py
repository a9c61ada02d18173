"""The light verbs, the errors of the program itself, and the examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.main import get_command
from typer.testing import CliRunner

import qtarget
from qtarget.cli.app import app
from qtarget.cli.main import run
from qtarget.cli.targets import targets_table
from tests import ROOT

EXAMPLE_ROWS = 64


def test_the_table_of_targets_as_json_is_the_registry():
    result = CliRunner().invoke(app, ["targets", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    regions = qtarget.available_trust_regions()
    assert list(rows) == [*qtarget.available_targets(), *regions]
    assert [name for name, row in rows.items() if row["kind"] == "trust region"] == regions
    assert rows["dppo_tv"]["needs"] == ["advantages"]
    assert rows["dft"] | {"paper": "", "formula": ""} == {
        "name": "dft", "kind": "target", "formula": "", "needs": [], "scope": "token", "hyperparameters": {}, "paper": "",
    }  # fmt: skip
    assert rows["asft"]["needs"] == ["reference.distribution"]
    assert rows["asft"]["hyperparameters"] == {"kl_weight": 0.05}
    assert rows["target_sft"]["needs"] == ["teacher.distribution"]
    assert rows["iw_sft"]["scope"] == "sequence"


def test_the_table_prints_formulas_as_they_are():
    printed = CliRunner().invoke(app, ["targets"]).stdout
    for name in [*qtarget.available_targets(), *qtarget.available_trust_regions()]:
        assert f" {name} " in printed
    assert "-1[p_y > tau] log p_y" in printed  # brackets are not taken for markup


@pytest.mark.parametrize("narrow", [True, False])
def test_both_layouts_hold_every_fact(narrow):
    from rich.console import Console

    row = {
        "name": "n",
        "formula": "f[1]",
        "needs": ["a.b"],
        "scope": "token",
        "hyperparameters": {"k": 0.5},
        "paper": "p1",
    }
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(targets_table([row], narrow))
    text = console.export_text()
    assert all(fact in text for fact in ("n", "f[1]", "a.b", "token", "k=0.5", "p1"))


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def every_verb(command, path=()):
    """The words of each verb and of each group of verbs."""
    yield path
    for name, part in getattr(command, "commands", {}).items():
        yield from every_verb(part, (*path, name))


def test_no_help_is_cut_at_eighty_columns():
    """Each option of each verb stands there with its whole name, and nothing ends in an ellipsis."""
    verbs = list(every_verb(get_command(app)))
    assert ("cache", "import") in verbs
    for verb in verbs:
        result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "80"})
        assert result.exit_code == 0
        assert "…" not in result.output, (verb, result.output)
        command = get_command(app)
        for name in verb:
            command = command.commands[name]
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert re.search(rf"{option}[\s,]", result.output), (verb, option)


def test_an_option_may_be_spelled_with_dashes_or_underscores():
    told = []
    for spelling in ("--sampling-seed", "--sampling_seed"):
        result = CliRunner().invoke(app, ["score", "run.yaml", spelling, "-1"])
        told.append(result.output)
        assert result.exit_code == 2
    assert told[0] == told[1] and "'--sampling-seed': Input should be greater" in told[0]


def test_noise_marks_what_it_touched_and_leaves_the_rest(tmp_path, tiny_model):
    clean = [{"prompt": f"{i}?", "completion": "alpha beta gamma", "id": i} for i in range(20)]
    source, out = tmp_path / "clean.jsonl", tmp_path / "new" / "noisy.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in clean))
    arguments = ["noise", str(source), str(out), "--kind", "random_tokens", "--rate", "0.25", "--seed", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    noisy = rows_of(out)
    assert sum(len(row["noise_spans"]) for row in noisy) == 15  # a quarter of 60 words
    assert "15 marked spans" in result.stdout
    for before, after in zip(clean, noisy, strict=True):
        text, position = after["completion"], 0
        kept = ""
        for start, end, _ in after["noise_spans"]:
            kept += text[position:start] + "*"
            position = end
        words = (kept + text[position:]).split()
        assert all(new in ("*", old) for new, old in zip(words, before["completion"].split(), strict=True))
        assert after["id"] == before["id"]
    again = CliRunner().invoke(app, arguments)
    assert "exists" in str(again.exception)
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert rows_of(out) == noisy
    characters = CliRunner().invoke(app, [*arguments, "--overwrite", "--tokenizer", str(tiny_model)])
    assert characters.exit_code == 0, characters.output
    assert sum(len(row["noise_spans"]) for row in rows_of(out)) == 20 * 16 // 4  # one token a character


def test_an_unknown_kind_and_a_bad_tokenizer_say_so(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "empty").mkdir()
    for extra, words in (
        (["--kind", "static"], "unknown noise kind 'static'; known kinds: random_tokens"),
        (["--kind", "boilerplate", "--tokenizer", str(tmp_path / "empty")], "expected a folder or a hub name"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(["noise", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--rate", "0.5", *extra])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in [module for module in sys.modules if module.startswith("qtarget.cli.app")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit) as ended:
        run(["targets"])
    assert ended.value.code == 2
    assert "needs typer; run `pip install 'qtarget[train]'`" in capsys.readouterr().err


def test_help_and_the_light_verbs_load_no_trainer():
    code = (
        "import sys; from qtarget.cli.main import run\n"
        "try: run(['targets', '--json'])\nexcept SystemExit: pass\n"
        "assert not {'transformers', 'trl', 'datasets', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_the_yaml_example_noise_score_train(tmp_path, monkeypatch, capsys):
    from qtarget.data.embedded import base_model_path, load_demonstrations

    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in load_demonstrations("train")[:EXAMPLE_ROWS])
    )
    config = str(ROOT / "examples/noisy_sft/run.yaml")
    commands = [
        ["noise", "rows.jsonl", "runs/noisy/train.jsonl", "--kind", "random_tokens", "--rate", "0.2",
         "--tokenizer", str(base_model_path())],
        ["score", config, "--top_k", "32"],
        ["train", config, "--num_train_epochs", "1", "--logging_steps", "1"],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            run(command)
        assert ended.value.code == 0
    summary = json.loads((tmp_path / "runs/noisy/consensus/train_summary.json").read_text())
    assert summary["steps"] == EXAMPLE_ROWS // 16
    assert summary["eval_nll"] > 0
    assert len(list(tmp_path.glob("runs/noisy/reference_cache-*/manifest.json"))) == 1


@pytest.mark.slow
def test_the_python_example_learns_from_noisy_rows():
    command = [sys.executable, ROOT / "examples/noisy_sft/train.py"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    before, after = ended.stdout.rsplit(": ", 1)[1].split(" -> ")
    assert float(after) < float(before)


def test_no_option_takes_a_number_that_is_none() -> None:
    """Every float of every verb: `nan` and `inf` pass click's ranges."""
    import typing

    from qtarget.cli import cache, demo, noise, serve
    from qtarget.cli.bench import proof, scoring, speed
    from qtarget.cli.options.typed import finite

    seen = 0
    for module in (cache, demo, noise, serve, proof, scoring, speed):
        for function in vars(module).values():
            if not callable(function) or getattr(function, "__module__", "") != module.__name__:
                continue
            named = {name for name, text in function.__annotations__.items() if "typer.Option" in str(text)}
            given = vars(module) | {"Manifest": object}
            for name in named:
                hint = eval(function.__annotations__[name], given)
                if typing.get_origin(hint) is typing.Annotated and typing.get_args(hint)[0] is float:
                    assert typing.get_args(hint)[1].callback is finite, (module.__name__, name)
                    seen += 1
    assert seen >= 6


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_rates_that_are_no_rates(value, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run = CliRunner().invoke(
        app,
        [
            "noise",
            str(tmp_path / "rows.jsonl"),
            str(tmp_path / "out.jsonl"),
            "--kind",
            "wrong_answers",
            "--rate",
            value,
        ],
    )
    assert run.exit_code == 2 and "--rate" in run.output
    assert not (tmp_path / "out.jsonl").exists()
