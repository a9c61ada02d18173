"""`qtarget report` end to end: two runs trained, compared, and their checkpoints scored again by another way."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import ROOT
from tests.cli.test_train import qtarget, refused

EVALUATING = {
    "validation_file": "held_out.jsonl", "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True,
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip


def nll_of(folder: Path, tokenizer_folder: Path, rows: Path) -> float:
    """Mean over completion tokens, each row alone through the whole model: nats a token."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(tokenizer_folder),
    )
    values: list[float] = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        values += log_probs[len(prompt) - 1 :].tolist()
    return -sum(values) / len(values)


def test_two_runs_compared_and_their_checkpoints_scored_again(workspace, tmp_path, tiny_model, capsys):
    sft, dft = tmp_path / "out", tmp_path / "dft"
    qtarget("train", workspace(**EVALUATING))
    qtarget("train", workspace(**EVALUATING), "--target", "dft", "--output_dir", dft)
    capsys.readouterr()
    page, numbers, figures = tmp_path / "a/report.html", tmp_path / "a/report.json", tmp_path / "figures"
    qtarget("report", sft, dft, "--output", page, "--json", numbers, "--png", figures)
    printed = capsys.readouterr().out
    report = json.loads(numbers.read_text())
    assert report["finding"] in " ".join(printed.split())
    assert page.read_text().startswith("<!doctype html>")
    assert {path.name for path in figures.iterdir()} == {
        "evaluation_nll.png", "training.png", "weights.png", "tokens-out-eval.png", "tokens-dft-eval.png",
    }  # fmt: skip
    held_out = tmp_path / "held_out.jsonl"
    for run, folder in zip(report["runs"], (sft, dft), strict=True):
        assert (run["status"]["state"], run["status"]["step"]) == ("finished", 4)
        assert run["evaluations"]["eval"]["step"] == [0, 2, 4]
        expected = [nll_of(tiny_model, tiny_model, held_out)]
        expected += [nll_of(folder / f"checkpoint-{step}", tiny_model, held_out) for step in (2, 4)]
        assert run["evaluations"]["eval"]["nll"] == pytest.approx(expected, rel=1e-5)
        assert run["evaluations"]["eval"]["nll"][-1] == pytest.approx(
            json.loads((folder / "train_summary.json").read_text())["eval_nll"]
        )
    qtarget("report", sft, dft, "--rows", held_out, "--output", page, "--json", numbers, "--overwrite")
    changes = json.loads(numbers.read_text())["tokens"]
    for change, folder in zip(changes, (sft, dft), strict=True):
        assert (change["source"], change["from_step"], change["to_step"]) == ("checkpoints", 2, 4)
        found = [change["nll_before"], change["nll_after"]]
        expected = [nll_of(folder / f"checkpoint-{step}", tiny_model, held_out) for step in (2, 4)]
        assert found == pytest.approx(expected, rel=1e-5)
        tokens = [(r["before"][t], r["after"][t]) for r in change["rows"] for t in range(len(r["tokens"]))]
        known = [after - before for before, after in tokens if before is not None]
        assert change["gains"][0]["change"] == pytest.approx(max(known))
        assert change["token_count"] == len(known) == sum(len(str(i + 1)) + 1 for i in range(50, 54))


def test_checkpoints_of_an_adapter_without_records(workspace, tmp_path):
    out, numbers = tmp_path / "out", tmp_path / "report.json"
    lora = ("--use_peft", "--lora_r", "2", "--lora_target_modules", "[q_proj]", "--learning_rate", "0.5")
    qtarget("train", workspace(**EVALUATING), *lora)
    logged = [json.loads(line) for line in (out / "qtarget_log.jsonl").read_text().splitlines()]
    for record in out.glob("qtarget_*"):
        record.unlink()
    qtarget("report", out, "--rows", tmp_path / "held_out.jsonl", "--output", tmp_path / "page.html", "--json", numbers)
    report = json.loads(numbers.read_text())
    expected = [next(line["eval_nll"] for line in logged if "eval_nll" in line and line["step"] == s) for s in (2, 4)]
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)
    change = report["tokens"][0]
    assert [change["nll_before"], change["nll_after"]] == pytest.approx(expected, rel=1e-4)
    assert any("cannot be checked" in note for note in report["runs"][0]["notes"])


def test_a_run_of_samples_leads_with_its_rewards(tmp_path, capsys):
    (tmp_path / "rl").mkdir()
    lines = [{"loss": 0.1, "reward": value, "step": step} for step, value in ((1, 0.25), (2, 0.5))]
    (tmp_path / "rl/qtarget_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    qtarget("report", tmp_path / "rl")
    said = capsys.readouterr().out
    assert "0.2500" in said and "0.5000" in said and "first reward" in said and "nll" not in said.split("rl:")[0]


def test_refusals_are_one_block(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    assert "not a folder" in refused(capsys, "report", tmp_path / "none")
    assert "holds no run" in refused(capsys, "report", tmp_path)
    qtarget("train", workspace(max_steps=2))
    rows = tmp_path / "held_out.jsonl"
    assert "0 checkpoints" in refused(capsys, "report", out, "--rows", rows)
    assert "name a file" in refused(capsys, "report", out, "--output", tmp_path)
    assert "name a folder" in refused(capsys, "report", out, "--png", rows)
    assert not list(tmp_path.glob("*.html"))
    qtarget("train", workspace(**EVALUATING), "--output_dir", tmp_path / "saved")
    assert "no checkpoint at step 3; there are 2, 4" in refused(
        capsys, "report", tmp_path / "saved", "--rows", rows, "--from-step", "3"
    )
    assert "both 4" in refused(capsys, "report", tmp_path / "saved", "--rows", rows, "--from-step", "4")
    assert "at step 3; there are some at 0, 2, 4" in refused(
        capsys, "report", tmp_path / "saved", "--to-step", "3", "--output", tmp_path / "page.html"
    )


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    """In a copy of what they read, so that the repository stays as it is; six steps instead of sixty."""
    for part in ("examples", "src"):
        (tmp_path / part).symlink_to(ROOT / part)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/report.md").read_text()
    commands = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
                for line in block.splitlines() if line.startswith("qtarget ")]  # fmt: skip
    assert [command[1] for command in commands] == ["train", "train", "train", "report", "report"]
    quick = [
        "--max_steps",
        "6",
        "--eval_on_start",
        "false",
        "--eval_steps",
        "3",
        "--save_steps",
        "3",
        "--per_device_eval_batch_size",
        "64",
    ]
    for command in commands:
        qtarget(*command[1:], *(quick if command[1] == "train" else []))
    report = json.loads(Path("runs/live/report.json").read_text())
    assert [run["target"] for run in report["runs"]] == ["sft", "label_smoothing", "dft"]
    assert Path("runs/live/checkpoints.html").exists()
