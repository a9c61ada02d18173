"""``qtarget targets``: explanations come from docstrings and committed results; a new target passes its own test; the working
directory is importable in every verb."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")

import qtarget
from qtarget.cli.main import run
from qtarget.cli.new_target import write_target
from qtarget.cli.options import declared
from qtarget.cli.targets import explanation, explanation_lines, target_rows
from qtarget.core.errors import ConfigError
from qtarget.registry import available_targets, hyperparameters, target_class
from qtarget.report.audit.measured import measured, sentences
from tests import ROOT


def said(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as ended:
        run(list(arguments))
    assert ended.value.code == code
    return capsys.readouterr()


@pytest.mark.parametrize("name", available_targets())
def test_every_target_says_all_that_an_explanation_needs(name):
    """In its own docstrings: no second table."""
    found = explanation(name)
    assert found["summary"].endswith(".") and "``" in found["form"] and found["formula"] and found["paper"]
    assert found["reference"] and found["deviations"]
    assert found["arguments"].keys() == found["hyperparameters"].keys() == hyperparameters(target_class(name)).keys()
    if found["paper"][:4].isdigit():
        assert found["paper"] in found["reference"], "the paper's number stands in the docstring too"
    text = "\n".join(explanation_lines(found))
    assert name in text and found["formula"] in text
    json.dumps(found)


def test_the_measurements_are_the_result_files():
    raw = json.loads((ROOT / "benchmarks/results/noise.json").read_text())
    cells = raw["summary"]["cells"]
    intervals = [cell["methods"]["consensus"]["to_sft_points"] for cell in cells if "consensus" in cell["methods"]]
    (found,) = [part for part in measured("consensus")["to_sft"] if part["file"].endswith("/noise.json")]
    assert found["places"] == len(intervals) == 15
    assert len(found["won"]) == sum(row["low"] > 0 for row in intervals)
    assert len(found["lost"]) == sum(row["high"] < 0 for row in intervals)
    assert found["places"] == sum(len(found[kind]) for kind in ("won", "lost", "undecided"))
    best = max(row["mean"] for row in intervals)
    assert f"won at {len(found['won'])}: {best:+.1f} points" in "\n".join(sentences(measured("consensus")))
    prior = json.loads((ROOT / "benchmarks/results/prior.json").read_text())["summary"]["conditions"][0]["methods"]
    flaw = measured("dft")["flawed_prior"]["flaws"][0]
    assert (flaw["dft"], flaw["guarded"]) == tuple(
        prior[n]["corrected_percent"]["mean"] for n in ("dft", "dft, guarded")
    )


def test_what_was_never_measured_says_so(capsys):
    assert measured("forward_kl") == {"to_sft": [], "flawed_prior": {}}
    assert "never compared here" in said(capsys, "targets", "forward_kl").out
    assert "what the others are compared with" in said(capsys, "targets", "sft").out


def test_one_target_and_all_as_json(capsys):
    one = json.loads(said(capsys, "targets", "eaft", "--json").out)
    assert one["hyperparameters"] == {"alpha": 1.0, "top_k": 20} and "arXiv 2601.02151" in one["reference"]
    assert json.loads(said(capsys, "targets", "--json").out) == target_rows()


def test_combinations_are_explained_by_their_parts(capsys):
    text = said(capsys, "targets", "prior_surprise+label_smoothing").out
    assert "smoothing: 0.1" in text and "reference.label_log_probs  `qtarget score CONFIG.yaml`" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dftt"], "did you mean dft"), (["new"], "qtarget targets new NAME"), (["dft", "sft"], "expected one NAME"),
        (["new", "dft"], "my_dft"), (["new", "json"], "my_json"), (["new", "yaml"], "my_yaml"),
        (["new", "My-Target"], "small letters"),
        (["new", "class"], "small letters"), (["new", "a/b"], "small letters"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in said(capsys, "targets", *arguments, code=2).err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("careful", "judge_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for read in (declared._fields, declared._definition, declared._tree, declared._path):
        read.cache_clear()  # of a process that lives as long as one command
    return tmp_path


def test_a_new_target_passes_its_test_and_is_explained(there, capsys):
    assert "target: careful:Careful" in said(capsys, "targets", "new", "careful").out
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_careful.py"],
        capture_output=True,
        text=True,
        cwd=there,
        check=False,
    )
    assert ended.returncode == 0 and "4 passed" in ended.stdout, ended.stdout
    path = list(sys.path)
    assert "floor: 0.5  f in [0, 1]" in said(capsys, "targets", "careful:Careful").out
    assert sys.path == path


@pytest.mark.parametrize("taken", ["careful.py", "test_careful.py"])
def test_nothing_is_written_over(taken, there):
    (there / taken).write_text("mine")
    with pytest.raises(ConfigError, match=f"{taken} is there already"):
        write_target("careful", there)
    assert [path.name for path in there.iterdir()] == [taken] and (there / taken).read_text() == "mine"


def test_a_broken_target_of_ones_own_ends_each_verb_before_the_model(there, workspace, capsys):
    (there / "careful.py").write_text(
        "import qtarget\nclass Careful(qtarget.LabelWeight):\n    name, formula, paper = 'careful', '?', 'ours'\n"
        "    def label_weights(self, x):\n        return x.label_log_probs.exp()\n"
    )
    config = workspace(target="careful:Careful")
    for verb in (["train"], ["score", "--output", "cache"], ["inspect"]):
        error = said(capsys, verb[0], str(config), *verb[1:], code=2).err
        assert 'breaks the contract, line "weights": label_weights carries a gradient' in error
    for verb in (["lens", "careful:Careful"], ["targets", "careful:Careful"]):
        assert 'line "weights"' in said(capsys, *verb, code=2).err
    assert not (there / "out").exists() and not (there / "cache").exists()


def test_a_target_in_the_working_directory_trains(there, workspace, capsys):
    write_target("careful", there)
    config = workspace(target="careful:Careful", target_kwargs={"floor": 0.3}, max_steps=1)
    said(capsys, "train", str(config))
    summary = json.loads((there / "out" / "train_summary.json").read_text())
    assert summary["target"] == "careful:Careful"
    assert qtarget.__version__
