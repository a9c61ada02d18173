"""`qtarget evaluate` end to end: runs of the embedded base, judged, scored, killed and gone on with, here and from a server."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtarget.cli.evaluate import rows_as_trained
from qtarget.core.errors import ConfigError, DataError
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.evaluation.contenders import Contender
from tests import ROOT
from tests.cli.test_train import qtarget, refused
from tests.scoring.sources.servers import Engine, half_json, serving, status

BRACKETS = ("--metric", "regex", "--pattern", r"\[(.*?)\]")
COUNT = 24


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with `sft` (40 steps), `lora` (an adapter, 8 steps), `data.jsonl` and `kept.jsonl`."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = {
        "model_name_or_path": str(base_model_path()),
        "train_file": str(write_rows(folder / "train.jsonl", load_demonstrations("train"))),
        "output_dir": str(folder / "sft"), "per_device_train_batch_size": 16, "max_steps": 40, "learning_rate": 0.001,
        "save_strategy": "no", "logging_steps": 20, "report_to": "none", "bf16": False, "use_cpu": True,
        "activation_checkpointing": False,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    qtarget("train", folder / "run.yaml")
    lora = ("--use_peft", "--lora_r", "2", "--lora_target_modules", "[q_proj, v_proj]", "--learning_rate", "0.05")
    qtarget("train", folder / "run.yaml", "--output_dir", folder / "lora", "--max_steps", "8", *lora)
    write_rows(folder / "data.jsonl", load_demonstrations("test")[:COUNT])
    write_rows(folder / "kept.jsonl", load_demonstrations("heldout_skills_test")[:10])
    return folder


@pytest.fixture
def evaluated(runs, tmp_path):
    """A function that evaluates and returns the document and the records."""

    def run(*arguments: object, output: str = "e.json") -> tuple[dict, list[dict]]:
        qtarget("evaluate", *arguments, "--output", tmp_path / output)
        lines = (tmp_path / output).with_suffix(".rows.jsonl").read_text().splitlines()
        return json.loads((tmp_path / output).read_text()), [json.loads(line) for line in lines[1:]]

    return run


@torch.no_grad()
def answer(model, tokenizer, prompt: str, most: int) -> str:
    """Greedy, one token at a time."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(most):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@torch.no_grad()
def nll(model, tokenizer, rows: list[dict]) -> float:
    """Mean over answer tokens, each row alone: nats a token."""
    values: list[float] = []
    for row in rows:
        start = len(tokenizer(row["prompt"])["input_ids"])
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        values += model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[start - 1 :, 0].tolist()
    return -sum(values) / len(values)


def by_name(document: dict) -> dict[str, dict]:
    return {one["name"]: one for one in document["contenders"]}


def test_runs_adapters_and_the_base_beside_an_independent_count(runs, evaluated, tmp_path, capsys):
    document, records = evaluated(runs / "sft", runs / "lora", "--data", runs / "data.jsonl", *BRACKETS,
                                  "--forgetting", runs / "kept.jsonl", "--forgetting-metric", "exact")  # fmt: skip
    printed = capsys.readouterr().out
    assert document["finding"] in printed and "e.html" in printed
    assert list(by_name(document)) == ["base_model", str(runs / "sft"), str(runs / "lora")]
    rows = load_demonstrations("test")[:COUNT]
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(runs / "lora").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for one, folder in zip(document["contenders"], (base_model_path(), runs / "sft", tmp_path / "merged"), strict=True):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(runs / "sft"),
        )
        most = one["max_new_tokens"]["data"]
        said = [answer(model, tokenizer, row["prompt"], most) for row in rows]
        mine = {line["row"]: line for line in records if line["part"] == "completion" and line["set"] == "data"
                and line["contender"] == one["name"]}  # fmt: skip
        assert [mine[i]["completions"][0] for i in range(COUNT)] == said
        answers = [re.findall(r"\[(.*?)\]", text) for text in said]
        right = [bool(a) and a[-1].strip() == row["answer"] for a, row in zip(answers, rows, strict=True)]
        found = one["sets"]["data"]
        assert found["completion"]["mean"] == pytest.approx(sum(right) / COUNT)
        assert found["nll"]["mean"] == pytest.approx(nll(model, tokenizer, rows), rel=1e-4)
        assert found["nll"]["low"] < found["nll"]["mean"] < found["nll"]["high"]
        kept = load_demonstrations("heldout_skills_test")[:10]
        assert one["sets"]["forgetting"]["nll"]["mean"] == pytest.approx(nll(model, tokenizer, kept), rel=1e-4)
    base, sft, lora = document["contenders"]
    assert (base["base"], sft["base"], lora["base"]) == (None, "base_model", "base_model")
    change = sft["sets"]["data"]["to_base"]
    assert change["nll"]["mean"] == pytest.approx(
        sft["sets"]["data"]["nll"]["mean"] - base["sets"]["data"]["nll"]["mean"]
    )
    assert change["nll"]["high"] < 0 < change["completion"]["low"]
    (pair,) = document["pairs"]
    assert pair["sets"]["data"]["nll"]["mean"] == pytest.approx(
        sft["sets"]["data"]["nll"]["mean"] - lora["sets"]["data"]["nll"]["mean"]
    )
    assert document["rows"]["data"]["differing"] == len(document["rows"]["data"]["shown"]) > 0


def test_killed_and_gone_on_with_it_is_the_same_json(runs, evaluated, tmp_path):
    command = (runs / "sft", "--data", runs / "data.jsonl", *BRACKETS, "--batch-size", "4")
    evaluated(*command)
    output = tmp_path / "killed.json"
    records = output.with_suffix(".rows.jsonl")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "qtarget.cli.main", "evaluate", *map(str, command), "--output", str(output)]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not records.is_file() or records.read_text().count("\n") < COUNT + 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    known = records.read_text().count("\n")
    assert known < 4 * COUNT + 1
    qtarget("evaluate", *command, "--output", output, "--resume")
    assert output.read_bytes() == (tmp_path / "e.json").read_bytes()


def test_draws_go_on_where_a_line_was_cut_and_other_plans_are_refused(runs, evaluated, tmp_path, capsys):
    command = (runs / "sft", "--data", runs / "data.jsonl", *BRACKETS, "--batch-size", "5", "--no-nll")
    drawn = ("--temperature", "0.5", "--samples", "3")
    document, lines = evaluated(*command, *drawn)
    assert len({text for line in lines for text in line["completions"]}) > COUNT
    rows = load_demonstrations("test")
    scores = [[re.findall(r"\[(.*?)\]", text)[-1:] == [rows[line["row"]]["answer"]] for text in line["completions"]]
              for line in lines if line["contender"] == str(runs / "sft")]  # fmt: skip
    found = by_name(document)[str(runs / "sft")]["sets"]["data"]["completion"]
    assert found["mean"] == pytest.approx(sum(map(sum, scores)) / (3 * COUNT)) and 0 < found["mean"] < 1
    assert found["method"] == "bootstrap"
    records, whole = tmp_path / "e.rows.jsonl", (tmp_path / "e.json").read_bytes()
    kept = records.read_bytes().splitlines(keepends=True)[:18]
    records.write_bytes(b"".join(kept) + b'{"part": "compl')
    (tmp_path / "e.json").unlink()
    evaluated(*command, *drawn, "--resume")
    assert (tmp_path / "e.json").read_bytes() == whole
    output = ("--output", tmp_path / "e.json")
    assert "holds an earlier evaluation" in refused(capsys, "evaluate", *command, *drawn, *output)
    for other, part in (
        (("--temperature", "0.7", "--samples", "3"), "temperature was"),
        ((*drawn, "--seed", "1"), "seed was 0 and is 1"),
        ((*drawn, "--limit", "3"), "rows.data was"),
    ):
        assert part in refused(capsys, "evaluate", *command, *other, *output, "--resume")


def test_that_prompts_are_counted_is_said_by_an_evaluation_that_goes_on_too(runs, evaluated, tmp_path):
    chats = [{"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
             for row in load_demonstrations("test")[:4]]  # fmt: skip
    command = (runs / "sft", "--data", write_rows(tmp_path / "chats.jsonl", chats), "--no-generate")
    document, _ = evaluated(*command)
    notes = by_name(document)[str(runs / "sft")]["notes"]
    assert any("chats.jsonl counts prompts too" in note for note in notes)
    whole = (tmp_path / "e.json").read_bytes()
    (tmp_path / "e.json").unlink()
    evaluated(*command, "--resume")  # with every row known
    assert (tmp_path / "e.json").read_bytes() == whole


def test_completions_are_judged_anew_without_generating(runs, evaluated, tmp_path, monkeypatch):
    command = (runs / "sft", "--data", runs / "data.jsonl", "--no-nll")
    evaluated(*command)
    (tmp_path / "length_judge.py").write_text(
        "def f(prompt, completion, row):\n    return min(1, len(completion) / 100)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qtarget.evaluation.loaded.load_contender", None)  # no model may be needed
    document, lines = evaluated(*command, "--metric", "length_judge:f", "--resume")
    mine = [len(line["completions"][0]) / 100 for line in lines if line["contender"] == str(runs / "sft")]
    found = by_name(document)[str(runs / "sft")]["sets"]["data"]["completion"]
    assert found["mean"] == pytest.approx(sum(mine) / COUNT)
    assert document["sets"]["data"]["metric"] == "length_judge:f"


class Completing(Engine):
    """``/v1/completions`` of a server: greedy, one token at a time, as vLLM answers without log-probs."""

    scoring_path = "/v1/completions"

    def get(self, path: str) -> dict | None:
        return {"object": "list", "data": [{"id": "tuned"}]} if path == "/v1/models" else None

    def post(self, path: str, body: dict) -> tuple[int, dict] | None:
        if path != self.scoring_path:
            return None
        ids, reason = list(body["prompt"]), "length"
        for _ in range(body["max_tokens"]):
            ids.append(int(self.log_probs(ids)[-1].argmax()))
            if ids[-1] in body["stop_token_ids"]:
                reason = "stop"
                break
        text = self.tokenizer.decode(ids[len(body["prompt"]) :], skip_special_tokens=True)
        return 200, {"choices": [{"index": 0, "text": text, "finish_reason": reason}] * body["n"]}


def test_a_server_completes_what_the_model_would_here(runs, evaluated, monkeypatch, capsys):
    monkeypatch.setattr("qtarget.scoring.sources.http.random.uniform", lambda low, high: 0.0)
    command = (runs / "sft", "--data", runs / "data.jsonl", *BRACKETS, "--no-nll", "--limit", "8")
    here, _ = evaluated(*command)
    engine = Completing(AutoModelForCausalLM.from_pretrained(runs / "sft"), AutoTokenizer.from_pretrained(runs / "sft"))
    engine.faults += [status(503), half_json]
    name = str(runs / "sft")
    with serving(engine) as url:
        there, _ = evaluated(*command, "--url", url, "--served", f"{name}=tuned", output="served.json")
        assert f"{name} completes at {url} as tuned" in capsys.readouterr().out
        assert len([path for path, _ in engine.asked if path == "/v1/completions"]) == 8 + 2
        assert there["contenders"] == here["contenders"]
        for more, part in (
            ((), f"say which is which with --served {name}=tuned"),
            (("--served", f"{name}=other"), "serves tuned"),
            (("--served", "x=tuned"), "x is none of base_model"),
            (("--served", "tuned"), "expected MODEL=ID"),
        ):
            assert part in refused(capsys, "evaluate", *command, "--url", url, *more, "--output", runs / "x.json")
        engine.faults.append(status(400))
        failed = refused(
            capsys, "evaluate", *command, "--url", url, "--served", f"{name}=tuned", "--output", runs / "x.json"
        )
        assert "refuses with HTTP 400" in failed
    assert "give its --url" in refused(capsys, "evaluate", *command, "--served", "a=b")


def test_messages_ask_up_to_the_last_answer_and_text_is_scored_alone(runs, evaluated, tmp_path, capsys):
    rows = load_demonstrations("test")[:6]
    ask = [re.fullmatch(r"Instruction: (.*)\nResponse:\n", row["prompt"]).group(1) for row in rows]  # pyright: ignore[reportOptionalMemberAccess]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": row["completion"]}]}
        for q, row in zip(ask, rows, strict=True)
    ]
    plain, _ = evaluated(runs / "sft", "--data", write_rows(tmp_path / "plain.jsonl", rows), *BRACKETS, "--no-nll")
    chat = write_rows(tmp_path / "chat.jsonl", chats)
    texts = write_rows(tmp_path / "text.jsonl", [{"text": row["completion"]} for row in rows])
    found, _ = evaluated(runs / "sft", "--data", chat, *BRACKETS, "--forgetting", texts, output="chat.json")
    for name, one in by_name(found).items():
        theirs = by_name(plain)[name]["sets"]["data"]["completion"]
        assert one["sets"]["data"]["completion"] == theirs
        assert one["sets"]["forgetting"]["completion"] is None and one["sets"]["forgetting"]["nll"]["rows"] == 6
    assert "text.jsonl: rows without answers" in capsys.readouterr().out
    assert "rows without answers (columns text)" in refused(
        capsys, "evaluate", runs / "sft", "--data", texts, "--metric", "exact", "--output", tmp_path / "t.json"
    )


def test_refusals_are_one_block_and_leave_no_file(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_judges.py").write_text("def raises(*a):\n    raise RuntimeError('no')\ndef nothing(*a): ...\n")
    sft, data = runs / "sft", ("--data", runs / "data.jsonl")
    odd = write_rows(tmp_path / "odd.jsonl", [{"prompt": "a", "completion": "no brackets"}])
    for arguments, part in [
        ((runs / "sfd", *data), f"did you mean {sft}"),
        ((base_model_path(), *data), "pass --base MODEL"),
        ((sft, "--data", runs / "none.jsonl"), "is not a file"),
        ((sft, *data, "--metric", "regex", "--pattern", "a+"), "captures nothing"),
        ((sft, "--data", odd, *BRACKETS), "odd.jsonl, row 1: the reference does not match"),
        ((sft, *data, "--metric", "odd"), "is unknown"),
        ((sft, *data, "--samples", "2"), "set --temperature"),
        ((sft, *data, "--no-generate", "--metric", "exact"), "judge completions"),
        ((sft, *data, "--no-generate", "--no-nll"), "nothing to do"),
        ((sft, *data, "--forgetting-metric", "none"), "name that file"),
        ((sft, *data, "--output", "e.json", "--page", "e.json"), "choose two paths"),
        ((sft, *data, "--url", "localhost:1"), "is no URL"),
    ]:
        assert part in refused(capsys, "evaluate", *arguments), arguments
        assert {path.name for path in tmp_path.iterdir()} <= {"bad_judges.py", "odd.jsonl", "__pycache__"}
    short = ("--limit", "2", "--no-nll", "--output")
    for metric, part in (("raises", "raised RuntimeError: no, at data.jsonl, row"), ("nothing", "returned None")):
        assert part in refused(
            capsys, "evaluate", sft, *data, "--metric", f"bad_judges:{metric}", *short, f"{metric}.json"
        )


def test_options_are_checked_before_the_libraries_are_imported(runs):
    code = f"""
import sys
from qtarget.cli.main import run
try:
    run(["evaluate", {str(runs / "sft")!r}, "--data", {str(runs / "data.jsonl")!r}, "--metric", "regex", "--pattern", "("])
except SystemExit as ended:
    print(ended.code, [name for name in ("transformers", "trl", "datasets", "peft") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split(maxsplit=1) == ["2", "[]\n"]


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    """In a copy of what they read; six steps instead of sixty, and the first rows alone."""
    for part in ("examples", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/evaluate.md").read_text()
    commands = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
                for line in block.splitlines() if line.startswith("qtarget ")]  # fmt: skip
    assert [command[1] for command in commands] == ["train", "train", "evaluate", "evaluate"]
    quick = ["--max_steps", "6", "--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "no"]
    for command in commands:
        qtarget(*command[1:], *(quick if command[1] == "train" else ["--limit", "20"]))
    document = json.loads(Path("runs/live/evaluation.json").read_text())
    assert [one["name"] for one in document["contenders"]] == [
        "base_model", "runs/live/sft", "runs/live/label_smoothing"]  # fmt: skip
    assert Path("runs/live/evaluation.html").exists()


def ran(name: str, **settings) -> Contender:
    return Contender(name, name, name, settings=settings)


def test_rows_are_read_as_the_run_read_its_own():
    tools = {"tools_file": "/gone/tools.json"}  # asked for by the run's own rows alone
    keys = {
        "null_content": "drop",
        "roles": {"narrator": "user"},
        "data_format": "alpaca",
        "dataset_text_field": "body",
    }
    run, hub = ran("run", validation_file="rows.jsonl", limits={"rows": 7}, **keys), ran("hub/model")
    for contenders in ([run, hub], [hub, run]):
        own = rows_as_trained(contenders, Path("rows.jsonl"), None)
        assert (own.null_content, own.roles, own.format) == ("drop", {"narrator": "user"}, "alpaca")
        assert (own.text_field, own.limits.rows) == ("body", 7)
    other = rows_as_trained([ran("run", **keys, **tools)], Path("other.jsonl"), "{rows: 5}")
    assert (other.null_content, other.text_field, other.format, other.limits.rows) == ("drop", "body", "auto", 5)
    assert rows_as_trained([hub], Path("other.jsonl"), "{rows: 5}").limits.rows == 5
    with pytest.raises(DataError, match=r"/gone/tools.json"):
        rows_as_trained([ran("run", validation_file="rows.jsonl", **tools)], Path("rows.jsonl"), None)


def test_runs_that_read_rows_in_different_ways_are_not_evaluated_together():
    one, two = ran("a", roles={"narrator": "user"}, limits={"rows": 7}), ran("b", null_content="drop")
    with pytest.raises(ConfigError, match=r"a and b read rows in different ways \(null_content, roles\); evaluate one"):
        rows_as_trained([one, two], Path("other.jsonl"), None)
    default = ran("c", null_content="refuse", limits={"rows": 9})
    assert rows_as_trained([default, ran("d", learning_rate=1.0)], Path("x"), None).limits.rows == 9


def test_a_comparison_that_is_there_is_not_proposed_again(tmp_path, monkeypatch):
    from qtarget.cli.evaluate import comparison_of

    (run := tmp_path / "sft").mkdir()
    (run / "qtarget_config.yaml").write_text("target: sft\n")
    assert comparison_of([str(run)], {}, []).endswith("sft/qtarget_config.yaml")
    (begun := tmp_path / "sft-compare").mkdir()
    assert comparison_of([str(run)], {}, []).endswith("sft/qtarget_config.yaml")
    (begun / "plan.json").write_text("{}")
    assert comparison_of([str(run)], {}, []).endswith("sft/qtarget_config.yaml --resume")
    monkeypatch.chdir(run)
    assert comparison_of(["."], {}, []).endswith(" --resume")
    (begun / "comparison.json").write_text("{}")
    assert comparison_of([str(run)], {}, []) is comparison_of(["."], {}, []) is None
