"""One command where a target or a filter asks copies that have not seen the rows: `train`, `compare` and `filter` train them."""

from __future__ import annotations

import json
import re
import shutil
from unittest.mock import MagicMock

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.data import loading
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import MANIFEST


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_score_crossfit_writes_where_training_looks(workspace, tmp_path, caplog, capsys):
    runs = tmp_path / "runs"
    config = workspace(output_dir=str(runs / "a"), max_steps=1, target="crossfit_consensus")
    assert called("score", config, "--crossfit", "2", "--crossfit-steps", "1") == 0
    (other,) = runs.glob("witness-*")
    assert f"to train with it, set witness: {other}" in " ".join(capsys.readouterr().out.split())
    assert called("score", config, "--crossfit", "2") == 0
    (witness,) = set(runs.glob("witness-*")) - {other}
    assert called("train", config) == 0
    assert "cross-fitted once" not in caplog.text
    assert f"{witness.name} is taken" in caplog.text


def test_train_makes_the_witness_once_and_filter_audit_and_inspect_take_it(
    workspace, tmp_path, caplog, capsys, monkeypatch
):
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
    assert "the copies hardly expect" in capsys.readouterr().out
    checks = {one["check"] for one in json.loads((tmp_path / "audit.json").read_text())["findings"]}
    assert {"crossfit_noise", "crossfit_kinds"} <= checks
    page, numbers = tmp_path / "inspect.html", tmp_path / "inspect.json"
    read = MagicMock(wraps=loading.read_files)
    with monkeypatch.context() as patched:
        patched.setattr(loading, "read_files", read)
        assert called("inspect", config, "--output", page, "--json", numbers) == 0
    assert read.call_count == len({str(call.args[0]) for call in read.call_args_list})  # each file once
    found = json.loads(numbers.read_text())
    cache = ReferenceCache.open(witness)
    told = sorted(float(-cache.row(i)["label_log_probs"].mean()) for i in range(len(cache)))
    assert sorted(found["views"][0]["row_crossfit"]) == pytest.approx(told, rel=1e-4)
    assert len(found["rows"][0]["views"][0]["crossfit"]) == len(found["rows"][0]["trained"])
    (ordinary,) = runs.glob("reference*")
    foreign = shutil.copytree(witness, tmp_path / "foreign")
    manifest = json.loads((foreign / MANIFEST).read_text())
    (foreign / MANIFEST).write_text(
        json.dumps(manifest | {"crossfit": manifest["crossfit"] | {"base_fingerprint": "0" * 32}})
    )
    for named, words in (
        (ordinary, "is an ordinary cache, whose model may have seen the rows; expected a cross-fit: `qtarget score"),
        (foreign, "expected one base: score both with this config"),
    ):
        for line, code in (
            (["audit-data", config], 1),
            (["inspect", config, "--no-audit"], 2),
            (["filter", config], 2),
        ):
            capsys.readouterr()
            assert called(*line, "--witness", named) == code, line
            assert words in words_of(capsys)


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


def words_of(capsys) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + found.err).replace("│", " ").split())


def pasted(said: str) -> list[str]:
    """The last command in a text, as a shell reads it, without the program's name."""
    import shlex

    return shlex.split(re.findall(r"`(qtarget score [^`]+)`", said)[-1])[1:]


@pytest.fixture
def ignorant(workspace, tmp_path, monkeypatch):
    """A config of sixty rows, with a witness whose copies learnt for one step at a rate of nothing, beside a sure base."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = workspace(output_dir="runs/a", max_steps=1, witness="w", model_name_or_path=str(tmp_path / "base"))
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = json.loads(json.dumps(config.read_text()))
    assert "base" in tiny
    monkeypatch.chdir(tmp_path)

    def made(tiny_model, scale: float = 40.0):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)  # sure of what it says, and wrong
        model.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
        return config

    return made


def test_copies_that_know_nothing_are_told_by_every_verb_in_the_same_words(
    ignorant, tiny_model, tmp_path, capsys, caplog
):
    config = ignorant(tiny_model)
    short = ["--crossfit", "2", "--crossfit-steps", "1", "--crossfit-rate", "1e-9", "--output", "w"]
    assert called("score", config, *short) == 0
    assert "the copies do not know these rows" in words_of(capsys)
    assert called("score", config) == 0  # the base, into `reference_cache-...`
    said = []
    for line in (
        ["filter", config, "--rule", "crossfit", "--output", "kept"], ["audit-data", config],
        ["inspect", config, "--output", "page.html", "--no-audit"], ["train", config, "--target", "crossfit_consensus"],
    ):  # fmt: skip
        capsys.readouterr(), caplog.clear()
        code = called(*line)
        found = words_of(capsys) + caplog.text
        assert code == (2 if line[0] == "train" and re.search("know (less|no more) than the base", found) else 0), found
        said.append(found)
        assert "% of tokens" not in found or line[0] == "inspect"
    sentence = said[0].partition("the copies do not")[2].partition(";")[0]
    assert "nats a token, the base" in sentence
    assert all(f"the copies do not{sentence}" in found for found in said)
    commands = {tuple(pasted(found[found.index("the copies do not") :].partition(", then add")[0])) for found in said}
    (command,) = commands
    assert command[0] == "score"
    assert "--output" in command
    fast = [*command]
    fast[fast.index("--crossfit-steps") + 1] = "1"
    assert called(*fast) == 0
    assert ReferenceCache.open(command[command.index("--output") + 1]).manifest.crossfit is not None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["score", "--no-crossfit-prompts"], "--no-crossfit-prompts without --crossfit"),
        (["score", "--crossfit-steps", "3", "--crossfit-rank", "4"], "--crossfit-steps, --crossfit-rank without --crossfit"),
        (["score", "--crossfit", "2", "--output", "w", "--max_steps", "3"], "--max_steps"),
        (["filter", "--max_steps", "3"], "--max_steps"),
        (["filter", "--algorithm", "slf"], "algorithm: slf"),
        (["audit-data", "--algorithm", "slf"], "algorithm: slf"),
        (["filter"], "12 rows are too few"),
        (["filter", "--rule", "crossfit"], "12 rows are too few"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_before_anything_is_scored(workspace, tmp_path, capsys, line, words):
    verb, *options = line
    assert called(verb, workspace(output_dir=str(tmp_path / "runs/a")), *options) == 2
    said = words_of(capsys)
    assert words in said
    assert not list(tmp_path.glob("runs/*cache*"))
    if "--max_steps" in options:
        command = pasted(said)
        assert command[0] == "score"
        assert command[command.index("--crossfit-steps") + 1] == "3"
        assert "--max_steps" not in command


def test_an_unfinished_witness_is_told_and_never_read(workspace, tmp_path, capsys, caplog):
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.frozen import found_witness

    config = workspace(witness=str(tmp_path / "w"))
    assert found_witness(load_config(config)) is None
    assert "is not there yet" in caplog.text
    (tmp_path / "w/.copies").mkdir(parents=True)
    plan = {"crossfit": {"folds": 3, "recipe": {"steps": 7, "learning_rate": 1e-2, "rank": 4}}}
    (tmp_path / "w/.copies/plan.json").write_text(json.dumps(plan))
    assert found_witness(load_config(config)) is None
    assert "is not finished" in caplog.text
    command = pasted(caplog.text)
    assert command[command.index("--crossfit") :] == [
        "--crossfit", "3", "--crossfit-steps", "7", "--crossfit-rate", "0.01", "--crossfit-rank", "4", "--output",
        str(tmp_path / "w"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay", "max_grad_norm", "adam_beta2", "lr_scheduler_kwargs"])
def test_every_setting_that_decides_what_a_copy_learns_makes_another_witness(workspace, tmp_path, name):
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.frozen import witness_place
    from qtarget.integrations.sft.crossfit import CrossfitRecipe

    values = {"warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta2": 0.9,
              "lr_scheduler_kwargs": {"num_cycles": 2}}  # fmt: skip
    plain, other = (
        witness_place(load_config(workspace(output_dir=str(tmp_path / "out"), **keys)), CrossfitRecipe())
        for keys in ({}, {name: values[name]})
    )
    assert plain != other


def test_whoever_waits_for_a_writer_that_is_gone_ends(tmp_path, monkeypatch):
    import threading
    import time

    from qtarget.cli import missing
    from qtarget.core.errors import StorageError

    monkeypatch.setattr(missing, "LOOKS", 0.01)
    with pytest.raises(StorageError, match="raise ddp_timeout"):
        missing.wait_for(tmp_path / "w", 0.05)
    (tmp_path / "w").mkdir()

    def write() -> None:
        for number in range(8):  # longer than the limit, and never silent for so long
            time.sleep(0.1)
            (tmp_path / f"w/shard-{number}").touch()
        (tmp_path / "w" / MANIFEST).touch()

    thread = threading.Thread(target=write)
    thread.start()
    missing.wait_for(tmp_path / "w", 0.6)
    thread.join()
