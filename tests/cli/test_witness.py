"""One command where a target or a filter asks copies that have not seen the rows: `train`, `compare` and `filter` train them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.scoring.cache.reader import ReferenceCache


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_train_makes_the_witness_once_and_filter_audit_and_inspect_take_it(workspace, tmp_path, caplog, capsys):
    runs = tmp_path / "runs"
    config = workspace(output_dir=str(runs / "a"), max_steps=2, target="crossfit_consensus")
    assert called("train", config) == 0
    (witness,) = runs.glob("witness-*")
    told = ReferenceCache.open(witness).manifest.crossfit
    assert told is not None
    assert (told["folds"], told["recipe"]["rank"]) == (2, 16)
    assert (
        "cross-fitted once for target crossfit_consensus: 2 copies of the base, each trained on about 6 of 12 rows"
        in caplog.text
    )
    caplog.clear()
    assert called("train", config, "--output_dir", runs / "b", "--target", "sft", "--filter", "crossfit") == 0
    assert "cross-fitted once" not in caplog.text
    assert list(runs.glob("witness-*")) == [witness]
    summary = json.loads((runs / "b/train_summary.json").read_text())
    assert summary["filter"]["rule"] == "crossfit"
    assert called("filter", config, "--output", runs / "kept") == 0
    reasons = [json.loads(line) for line in (runs / "kept/reasons.jsonl").read_text().splitlines()]
    assert all({"surprise", "crossfit"} <= set(line["scores"]) for line in reasons)
    assert "copies expected that have not seen them" in (runs / "kept/filter.html").read_text()
    capsys.readouterr()
    assert called("audit-data", config, "--json", tmp_path / "audit.json") == 0
    assert "by copies that have not seen the rows" in capsys.readouterr().out
    checks = {one["check"] for one in json.loads((tmp_path / "audit.json").read_text())["findings"]}
    assert {"crossfit_noise", "crossfit_kinds"} <= checks
    page, numbers = tmp_path / "inspect.html", tmp_path / "inspect.json"
    assert called("inspect", config, "--output", page, "--json", numbers) == 0
    found = json.loads(numbers.read_text())
    cache = ReferenceCache.open(witness)
    told = sorted(float(-cache.row(i)["label_log_probs"].mean()) for i in range(len(cache)))
    assert sorted(found["views"][0]["row_crossfit"]) == pytest.approx(told, rel=1e-4)
    assert len(found["rows"][0]["views"][0]["crossfit"]) == len(found["rows"][0]["trained"])


def test_other_steps_of_the_run_keep_the_witness_and_another_batch_size_does_not(workspace, tmp_path):
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.frozen import witness_place
    from qtarget.integrations.sft.crossfit import CrossfitRecipe

    def place(**keys):
        return witness_place(load_config(workspace(output_dir=str(tmp_path / "out"), **keys)), CrossfitRecipe())

    rows = tmp_path / "rows.jsonl"
    weightless, whole = place(), rows.read_text()
    rows.write_text(whole.replace("}", ', "weight": 0.5}', 1))  # copies learn the weights, too
    assert place() != weightless
    rows.write_text(whole)
    assert place(max_steps=3) == place(max_steps=30) == place(learning_rate=1e-5) == place(target="dft")
    assert len({place(), place(per_device_train_batch_size=3), place(seed=7)}) == 3


def test_a_cross_fit_with_copies_still_there_is_not_finished(tmp_path):
    from qtarget.cli.options.frozen import is_finished
    from qtarget.scoring.cache.schema import MANIFEST
    from qtarget.scoring.contradictions import COPIES

    (tmp_path / MANIFEST).touch()
    assert is_finished(tmp_path)
    (tmp_path / COPIES).mkdir()  # all rows are judged, and the answers are being asked under other prompts
    assert not is_finished(tmp_path)


@pytest.mark.nightly
def test_a_cross_fit_that_was_killed_before_other_prompts_were_asked_is_finished_first(
    workspace, tmp_path, monkeypatch
):
    from qtarget.cli.options.frozen import is_finished
    from qtarget.integrations.sft.crossfit import score
    from qtarget.scoring.cache.schema import MANIFEST
    from qtarget.scoring.contradictions import COPIES, SIDE

    config = workspace(output_dir=str(tmp_path / "runs/a"), max_steps=1, target="crossfit_consensus")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score, "write_contradictions", killed)
        assert called("train", config) != 0
    (witness,) = (tmp_path / "runs").glob("witness-*")
    assert (witness / MANIFEST).is_file()  # all rows are judged, and other ranks wait still
    assert not is_finished(witness)
    assert called("train", config) == 0
    assert is_finished(witness) and (witness / SIDE).is_file() and not (witness / COPIES).exists()


@pytest.mark.nightly
def test_a_contender_that_asks_copies_is_one_command(workspace, tmp_path, caplog):
    config = workspace(output_dir=str(tmp_path / "runs/a"), max_steps=1, validation_file="held_out.jsonl")
    options = ["--targets", "crossfit_consensus", "--seeds", "1", "--rates", "1", "--at_once", "1", "--metric", "nll"]
    assert called("compare", config, *options) == 0
    assert "cross-fitted once for target crossfit_consensus, a contender" in caplog.text
    document = json.loads((tmp_path / "runs/a-compare/comparison.json").read_text())
    assert {one["name"] for one in document["contenders"]} == {"sft", "crossfit_consensus"}
    assert len(list((tmp_path / "runs").glob("witness-*"))) == 1


def test_a_named_witness_that_is_not_there_is_refused_with_the_command(workspace, tmp_path, capsys):
    config = workspace(output_dir=str(tmp_path / "runs/a"), target="crossfit_consensus", witness="nowhere")
    assert called("train", config) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "nowhere" in said
    assert "Traceback" not in said
