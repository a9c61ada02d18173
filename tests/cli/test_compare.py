"""`qtarget compare` end to end on the embedded base: numbers by another way, a kill, a budget, Ray, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.options.contenders import find_contenders
from qtarget.core.errors import ConfigError, QTargetError
from qtarget.data.embedded import base_model_path, load_demonstrations
from tests import ROOT
from tests.cli.test_train import qtarget, refused

BRACKETS = ("--metric", "regex", "--pattern", r"\[(.*?)\]")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path) -> Path:
    """48 rows, 16 validation rows of which one has no answer in brackets, 3 steps."""
    rows = load_demonstrations("train")
    held_out = [*load_demonstrations("test")[:15], {**load_demonstrations("test")[15], "completion": "no answer"}]
    settings = {
        "model_name_or_path": str(base_model_path()),
        "train_file": str(write_rows(tmp_path / "train.jsonl", rows[:48])),
        "validation_file": str(write_rows(tmp_path / "held_out.jsonl", held_out)),
        "target": "sft", "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 3,
        "learning_rate": 0.002, "report_to": "none", "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "dataloader_pin_memory": False, "save_strategy": "no", "compare": ["sft", {"target": "dft", "name": "mine"}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    write_rows(tmp_path / "kept.jsonl", load_demonstrations("heldout_skills_test")[:6])
    return tmp_path / "run.yaml"


def document_in(folder: Path) -> dict:
    return json.loads((folder / "comparison.json").read_text())


@pytest.mark.nightly
def test_its_numbers_are_those_of_train_and_evaluate(config, tmp_path, capsys):
    qtarget("compare", config, "--targets", "sft,consensus", "--rates", "1,2", "--seeds", "2", "--at-once", "1", *BRACKETS,
            "--forgetting", tmp_path / "kept.jsonl", "--forgetting-metric", "nll")  # fmt: skip
    document, printed = document_in(tmp_path / "run-compare"), capsys.readouterr().out
    assert document["finding"] in printed and "comparison.html" in printed
    assert "1 of 16 rows have no answer" in printed and document["sets"]["data"]["rows"] == 15
    assert [one["name"] for one in document["contenders"]] == ["sft", "consensus"]
    [cache] = tmp_path.glob("reference_cache-*")  # consensus reads a reference, scored once
    assert document["settings"]["steps"] == 3 and document["cost"]["runs"] == len(
        (tmp_path / "run-compare/runs.jsonl").read_text().splitlines())  # fmt: skip
    # the same by another way: train with the seed and rate of a run, evaluate what was saved
    write_rows(tmp_path / "judged.jsonl", load_demonstrations("test")[:15])
    runs = {
        line.pop("key"): line
        for line in map(json.loads, (tmp_path / "run-compare/runs.jsonl").read_text().splitlines())
    }
    key = next(key for key in runs if key.startswith("consensus|") and key.endswith("|1"))
    rate = key.split("|")[1]
    qtarget(
        "train",
        config,
        "--target",
        "consensus",
        "--learning_rate",
        rate,
        "--seed",
        "1",
        "--output_dir",
        tmp_path / "again",
    )
    assert [cache] == list(tmp_path.glob("reference_cache-*")), "train takes what compare has scored"
    qtarget("evaluate", tmp_path / "again", "--data", tmp_path / "judged.jsonl", *BRACKETS, "--forgetting", tmp_path / "kept.jsonl",
            "--forgetting-metric", "none", "--output", tmp_path / "e.json")  # fmt: skip
    base, again = json.loads((tmp_path / "e.json").read_text())["contenders"]
    for found, run in ((base, runs["base"]), (again, runs[key])):
        for name in ("data", "forgetting"):
            nats, tokens = (sum(column) for column in zip(*run["sets"][name]["nll"], strict=True))
            assert nats / tokens == pytest.approx(found["sets"][name]["nll"]["mean"], rel=1e-4)
        assert sum(run["sets"]["data"]["scores"]) / 15 == pytest.approx(found["sets"]["data"]["completion"]["mean"])
    assert runs[key]["sets"]["forgetting"]["scores"] is None and runs[key]["validation"]
    assert runs[key]["memory_bytes"] is None or runs[key]["memory_bytes"] > 10**8


def test_killed_and_gone_on_with_it_redoes_nothing_that_was_finished(config, tmp_path, capsys):
    folder = tmp_path / "out"
    command = ("compare", config, "--rates", "1", "--seeds", "3", "--output", folder, "--at-once", "2", *BRACKETS)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "qtarget.cli.main", *map(str, command)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    log, deadline = folder / "runs.jsonl", time.monotonic() + 180
    while not log.is_file() or log.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = log.read_text()[: log.read_text().rindex("\n") + 1]
    assert not (folder / "comparison.json").exists()
    assert "--resume goes on" in refused(capsys, *command)
    write_rows(tmp_path / "train.jsonl", load_demonstrations("train")[:50])
    assert "is of another evaluation: rows.train was" in refused(capsys, *command, "--resume")
    write_rows(tmp_path / "train.jsonl", load_demonstrations("train")[:48])
    qtarget(*command[:6], "--output", folder, "--at-once", "1", *BRACKETS, "--resume")
    assert log.read_text().startswith(finished) and len(log.read_text().splitlines()) == 7
    document = document_in(folder)
    assert [one["name"] for one in document["contenders"]] == ["sft", "mine"], "the config's own list"
    assert document["contenders"][1]["tuning"] == [] and len(document["contenders"][1]["by_seed"]) == 3
    assert not list(folder.glob("**/checkpoint-*"))


def assert_repeated(config: Path, document: dict, tmp_path: Path, capsys, caplog) -> None:
    """The verdict is said by audit and training of the same rows, and the command beside it trains what was taken."""
    capsys.readouterr()
    qtarget("audit-data", config)
    said = capsys.readouterr().out
    assert document["finding"] in said and "run-compare/comparison.json" in said and "No verdict" not in said
    rate = document["contenders"][0]["best_rate"]
    assert document["take"] == "sft" and rate == 0.002, "the config's own target and rate"
    [command] = [shlex.split(part) for part in said.split("`") if part.startswith("qtarget train ")]
    qtarget(*command[1:], "--max_steps", "1")
    assert document["finding"] in caplog.text and "of runs with other max_steps" in caplog.text
    assert "differs from this run" not in caplog.text
    qtarget("train", config, "--target", "dft", "--output_dir", tmp_path / "other")
    assert caplog.text.count("What was taken differs from this run: `--target sft`.") == 1
    capsys.readouterr()
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows + rows.splitlines()[0] + "\n")
    qtarget("audit-data", config)
    assert document["finding"] not in capsys.readouterr().out, "a verdict on other rows is none on these"
    (tmp_path / "train.jsonl").write_text(rows)


def test_rows_without_answers_and_a_budget(config, tmp_path, capsys, caplog):
    texts = [{"text": row["prompt"] + row["completion"]} for row in load_demonstrations("train")[:30]]
    write_rows(tmp_path / "train.jsonl", texts[:20])
    held_out = [texts[3], *texts[20:], texts[5]]
    write_rows(tmp_path / "held_out.jsonl", held_out)
    qtarget("compare", config, "--targets", "dft,gem(temperature=0.8)", "--rates", "1", "--seeds", "2", "--at-once", "1",
            "--budget", "5m")  # fmt: skip
    document = document_in(tmp_path / "run-compare")
    assert (
        document["measure"] == {"metric": "nll", "rows": 10, "seeds": 2, "cut_off": False}
        and document["left_out"] == []
    )
    assert [one["name"] for one in document["contenders"]] == ["sft", "dft", "gem(temperature=0.8)"]
    shown = document["rows"]["shown"]
    assert shown and all(
        held_out[one["row"]]["text"] == one["reference"] for one in shown
    )  # rows as the file counts them
    printed = capsys.readouterr().out
    assert "nats a token against sft" in document["finding"] and "nats a token" in printed
    assert "2 of 12 rows are training rows too, and judge nobody" in printed
    assert_repeated(config, document, tmp_path, capsys, caplog)
    assert "one run takes" in refused(
        capsys, "compare", config, "--budget", "1s", "--output", tmp_path / "b", "--at-once", "1"
    )
    write_rows(tmp_path / "held_out.jsonl", texts[:4])
    assert "all 4 rows are training rows too" in refused(capsys, "compare", config, "--output", tmp_path / "c")


def test_answers_of_weight_0_judge_nobody_and_runs_that_counted_them_are_not_gone_on_with(config, tmp_path, capsys):
    held_out = [row | {"weight": float(i > 3)} for i, row in enumerate(load_demonstrations("test")[:12])]
    write_rows(tmp_path / "held_out.jsonl", held_out)
    common = ("compare", config, "--targets", "sft,dft", "--rates", "1", "--seeds", "1", "--at-once", "1")
    qtarget(*common, *BRACKETS)
    folder, document = tmp_path / "run-compare", document_in(tmp_path / "run-compare")
    said = "held_out.jsonl: 4 rows whose answer has weight 0, or no token within max_length, judge nobody"
    assert document["measure"]["rows"] == 8 and document["left_out"] == [said] and said in capsys.readouterr().out
    runs = [json.loads(line)["sets"]["data"] for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert all(run["scores"][:4] == [None] * 4 and None not in run["scores"][4:] for run in runs)
    assert all([tokens > 0 for _, tokens in run["nll"]] == [False] * 4 + [True] * 8 for run in runs)
    qtarget(*common, "--metric", "exact", "--resume")
    assert document_in(folder)["measure"] == {**document["measure"], "metric": "exact"}, "judged anew, by the same rows"
    plan = json.loads((folder / "plan.json").read_text())
    assert plan.pop("weights")["rule"]
    (folder / "plan.json").write_text(json.dumps(plan))  # as before the rule had a name
    words = refused(capsys, *common, "--metric", "exact", "--resume")
    assert "counted tokens and answers of weight 0 too" in words and "begin anew with another --output" in words


def test_a_contender_that_leaves_no_room_for_answers_is_left_out_before_it_is_trained(config, tmp_path, monkeypatch):
    from qtarget.integrations.sft.trainer import QTargetTrainer

    def chat(row):
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }

    write_rows(tmp_path / "train.jsonl", [chat(row) for row in load_demonstrations("train")[:24]])
    write_rows(tmp_path / "held_out.jsonl", [chat(row) for row in load_demonstrations("test")[:4]])
    (tmp_path / "long.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'word ' * 400 }}{% endif %}"
    )
    trained, train = [], QTargetTrainer.train
    monkeypatch.setattr(QTargetTrainer, "train", lambda self, *args: trained.append(1) or train(self, *args))
    entries = ["dft", {"target": "sft", "name": "long", "chat_template_path": str(tmp_path / "long.jinja")}]
    qtarget("compare", config, "--compare", json.dumps(entries), "--rates", "1", "--seeds", "1", "--at-once", "1")
    document = document_in(tmp_path / "run-compare")
    [line] = document["left_out"]
    assert "held_out.jsonl: 4 of 4 rows have a prompt that fills the 256 positions of long" in line
    assert len(trained) == 2 == len(document["contenders"])


@pytest.mark.slow
@pytest.mark.nightly
def test_with_ray_it_is_the_same(config, tmp_path):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    write_rows(tmp_path / "held_out.jsonl", load_demonstrations("test")[:8])
    common = ("compare", config, "--rates", "1", "--seeds", "1", *BRACKETS)
    qtarget(*common, "--output", tmp_path / "local", "--at-once", "1")
    os.environ["PYTHONPATH"] = f"{ROOT / 'src'}"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    try:
        qtarget(*common, "--output", tmp_path / "ray", "--at-once", "2", "--engine", "ray")
    finally:
        ray.shutdown()
    one, other = (document_in(tmp_path / name) for name in ("local", "ray"))
    for a, b in zip(one["contenders"], other["contenders"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-5) and a["level"] == b["level"]
    assert other["cost"]["engine"] == "ray"


def test_runs_of_an_edited_target_are_not_taken_for_its_own(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qtarget("targets", "new", "edited")
    options = ("--targets", "edited:Edited", "--rates", "1", "--seeds", "1", "--at-once", "1", "--metric", "nll")
    qtarget("compare", config, *options)
    qtarget("compare", config, *options, "--resume")
    source = tmp_path / "edited.py"
    source.write_text(source.read_text().replace("floor: float = 0.5", "floor: float = 0.9"))
    assert "another edited:Edited: edited:Edited.source was" in refused(capsys, "compare", config, *options, "--resume")


def test_an_edited_metric_judges_the_kept_answers_anew(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "own_judges.py"
    source.write_text("def right(prompt, completion, row):\n    return len(completion) % 2 == 0\n")
    common = ("compare", config, "--rates", "1", "--seeds", "1", "--at-once", "1")
    qtarget(*common, "--metric", "own_judges:right")
    runs = (tmp_path / "run-compare" / "runs.jsonl").read_text()
    source.write_text(source.read_text().replace("== 0", "== 1"))
    monkeypatch.delitem(sys.modules, "own_judges")
    capsys.readouterr()
    qtarget(*common, "--metric", "own_judges:right", "--resume")
    assert "the kept answers of 3 finished runs were judged anew" in capsys.readouterr().out
    before, after = ([json.loads(line) for line in text.splitlines()]
                     for text in (runs, (tmp_path / "run-compare" / "runs.jsonl").read_text()))  # fmt: skip
    for one, other in zip(before, after, strict=True):
        assert one["seconds"] == other["seconds"], "nothing ran again"
        assert [1 - score for score in one["sets"]["data"]["scores"]] == other["sets"]["data"]["scores"]
    folder = tmp_path / "run-compare"
    plan = json.loads((folder / "plan.json").read_text())
    del plan["metrics"]  # a kill between the scores and the plan
    (folder / "plan.json").write_text(json.dumps(plan))
    qtarget(*common, "--metric", "own_judges:right", "--resume")
    assert "were judged anew" in capsys.readouterr().out and "metrics" in json.loads((folder / "plan.json").read_text())
    assert "judges other rows than the finished runs" in refused(capsys, *common, *BRACKETS, "--resume")
    qtarget(*common, "--metric", "nll", "--resume")
    assert document_in(folder)["measure"]["metric"] == "nll"
    first = json.loads((folder / "comparison-own_judges-right.json").read_text())
    assert first["measure"]["metric"] == "own_judges:right" and (folder / "comparison-own_judges-right.html").is_file()
    assert "was measured by nll" not in capsys.readouterr().err
    qtarget(*common, "--metric", "own_judges:right", "--resume")
    assert document_in(folder)["finding"] == first["finding"], "there and back again"


def test_a_teacher_named_later_goes_on_with_the_finished_runs(config, tmp_path, capsys):
    common = ("compare", config, "--rates", "1", "--seeds", "1", "--at-once", "1", "--metric", "nll")
    assert "needs a frozen teacher" in refused(capsys, *common, "--targets", "distillation")
    qtarget(*common)
    finished = (tmp_path / "run-compare" / "runs.jsonl").read_text()
    later = (*common, "--targets", "sft,distillation", "--resume")
    assert "needs a frozen teacher, and" in refused(capsys, *later), "and what it left in the plan binds nobody"
    qtarget(*later, "--teacher", base_model_path())
    assert (tmp_path / "run-compare" / "runs.jsonl").read_text().startswith(finished)
    assert [one["name"] for one in document_in(tmp_path / "run-compare")["contenders"]] == ["sft", "distillation"]
    other = shutil.copytree(base_model_path(), tmp_path / "other")
    assert "another distillation: distillation.teacher was" in refused(capsys, *later, "--teacher", other)
    assert "settings.max_steps was 3 and is 4" in refused(capsys, *common, "--resume", "--max_steps", "4")


def test_the_base_run_live_is_no_cache(config, tmp_path, capsys):
    options = ("--targets", "asft", "--reference", "live", "--rates", "1", "--seeds", "1", "--at-once", "1")
    qtarget("compare", config, *options, "--metric", "nll")
    assert [one["name"] for one in document_in(tmp_path / "run-compare")["contenders"]] == ["sft", "asft"]
    assert not list(tmp_path.glob("reference_cache*"))
    assert "`qtarget train` scores it where reference is unset" in refused(
        capsys, "compare", config, *options, "--filters", "auto", "--output", tmp_path / "b"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rates", "1,-2"], "multiples of the config's learning rate"),
        (["--budget", "later"], "is no time"),
        (["--targets", "sftt"], "did you mean"),
        (["--target", "sft,dft"], "--targets names those to compare"),
        (["--metric", "exactt"], "exact, regex, number, json, nll, or"),
        (["--targets", "label_smoothing(0.2)"], "is no key=value"),
        (["--targets", "dft,dft"], "names dft twice"),
        (["--filters", "none,magic"], "rule 'magic' is unknown"),
        (["--filter", "magic"], "rule 'magic' is unknown"),  # the config's own is taken where --filters is not said
        (["--targets", "sft"], "nothing to be compared with"),
        (["--budget", "5"], "is no time"),
        (["--metric", "regex"], "pattern"),
        (["--forgetting-metric", "exact"], "--forgetting"),
        (["--validation_file", "null"], "validation_file is missing"),
        (["--targets", "distillation"], "needs a frozen teacher"),
        (["--compare", "[{target: sft, name: slow, learning_rate: 1.0e-9}]"], "slow has learning_rate of its own"),
        (["--compare", "[{target: sft, name: less, train_file: a, seed: 3}]"], "less has seed, train_file of its own"),
        (["--pattern", "no group", "--metric", "regex"], "group"),
    ],
)
def test_refused_in_words(config, capsys, options, words):
    assert words in refused(capsys, "compare", config, *options)


def test_contenders_as_people_write_them():
    own = {"target": "label_smoothing", "target_kwargs": {"smoothing": 0.3}, "guard": None}
    wanted = ["label_smoothing", "sft", "gem(temperature=0.8)", {"target": "sft", "neftune_noise_alpha": 5}]
    found = find_contenders(wanted, ["none"], own)
    assert [one.name for one in found] == [
        "sft",
        "label_smoothing",
        "gem(temperature=0.8)",
        "sft (neftune_noise_alpha=5)",
    ]
    assert found[1].overrides["target_kwargs"] == {"smoothing": 0.3}, "the file's own, for the file's own target"
    assert found[0].overrides["target_kwargs"] is None
    names = [one.name for one in find_contenders(["dft"], ["none", "auto"], {})]
    assert names == ["sft", "dft", "dft, filtered"]
    with pytest.raises(ConfigError, match="trained twice"):
        find_contenders(["dft", {"target": "dft", "name": "other"}], ["none"], {})
    with pytest.raises(QTargetError, match="is unknown"):
        find_contenders(["dft(smoothing=1)"], ["none"], {})
