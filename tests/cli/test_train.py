"""`qtarget train` and `qtarget score` from a config file to the files they leave."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

import torch
from safetensors.torch import load_file

from qtarget.cli.main import run
from qtarget.cli.train import summarize


def qtarget(*arguments: object) -> None:
    """Run a verb that must succeed."""
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    assert ended.value.code == 0


def refused(capsys, *arguments: object) -> str:
    """Run a verb that must fail, and return what it printed."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "train_summary.json").read_text())


def test_training_leaves_model_tokenizer_config_and_summary(workspace, tmp_path, tiny_model, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = workspace(validation_file="held_out.jsonl")
    qtarget("train", config, "--target", "dft", "--max_steps=6")
    printed, errors = capsys.readouterr()
    assert "/6 [" not in errors and "step 1: loss" in printed  # no bar where nobody watches, but lines
    out = tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).decode([33, 34]) == AutoTokenizer.from_pretrained(tiny_model).decode(
        [33, 34]
    )
    before, after = load_file(tiny_model / "model.safetensors"), load_file(out / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)
    saved = yaml.safe_load((out / "qtarget_config.yaml").read_text())
    assert (saved["target"], saved["max_steps"], saved["train_file"]) == ("dft", 6, str(tmp_path / "rows.jsonl"))
    summary = summary_of(out)
    assert (summary["target"], summary["steps"]) == ("dft", 6)
    assert summary["last_nll"] < summary["first_nll"]
    assert {"eval_nll", "first_loss", "last_token_accuracy", "seconds"} <= set(summary)
    # 6 steps of 4 rows: two epochs of 12 rows, each "i+1=" + completion + eos
    tokens = sum(len(f"{i}+1={i + 1}") + 1 for i in range(12))
    assert summary["tokens"] == 2 * tokens
    assert "trained with target dft" in printed
    assert f"{summary['first_nll']:.4f} -> {summary['last_nll']:.4f}" in printed
    for line in printed.partition("next:\n")[2].splitlines():  # what is printed runs as it stands
        qtarget(*shlex.split(line, comments=True)[1:])
    evaluated, reported = capsys.readouterr().out.partition("next, ")[::2]
    assert "(base)" in evaluated and "the only evaluation" in reported
    assert f"qtarget compare {out / 'qtarget_config.yaml'}" in reported


def test_score_then_train_from_the_cache(workspace, tmp_path, tiny_model, capsys):
    config = workspace(target="asft", reference_cache="cache", validation_file="held_out.jsonl")
    errors = refused(capsys, "train", config)
    assert "qtarget score" in errors
    qtarget("score", config, "--reference_cache", tmp_path / "cache", "--top_k", "5")
    printed = capsys.readouterr().out
    supervised = sum(len(str(i + 1)) + 1 for i in [*range(12), *range(50, 54)])
    assert "16 different rows" in printed
    assert f"{supervised} supervised tokens, top_k 5" in printed
    qtarget("train", config)
    cached = summary_of(tmp_path / "out")
    qtarget(
        "train",
        workspace(target="asft", reference_model_name_or_path=str(tiny_model)),
        "--output_dir",
        tmp_path / "live",
    )
    live = summary_of(tmp_path / "live")
    # top-5 with a bucket tail against all 98 tokens: the label part is the same, the small anchor nearly
    assert cached["first_nll"] == pytest.approx(live["first_nll"], abs=1e-6)
    assert cached["last_nll"] == pytest.approx(live["last_nll"], abs=1e-2)


def test_score_writes_where_it_is_told(workspace, tmp_path):
    qtarget("score", workspace(), "--output", tmp_path / "elsewhere", "--max_length", "6")
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


def test_an_earlier_run_is_never_written_over(workspace, tmp_path, capsys):
    out = tmp_path / "out"
    config = workspace(save_strategy="steps", save_steps=2)
    qtarget("train", config)
    weights = (out / "model.safetensors").read_bytes()
    assert "--resume true" in refused(capsys, "train", config)
    (out / "model.safetensors").unlink()
    (out / "checkpoint-4" / "model.safetensors").unlink()  # as a kill while saving leaves it, with the mark missing too
    (out / "checkpoint-4" / "qtarget_complete").unlink()
    qtarget("train", config, "--resume", "true")
    assert (out / "model.safetensors").read_bytes() == weights
    assert summary_of(out)["resumed_from"] == str(out / "checkpoint-2")
    assert "not a folder" in refused(capsys, "train", config, "--resume_from_checkpoint", tmp_path / "none")
    assert "both set" in refused(
        capsys, "train", config, "--resume", "true", "--resume_from_checkpoint", out / "checkpoint-2"
    )


def test_a_finished_run_without_checkpoints_is_kept_and_resume_may_start_anew(workspace, tmp_path, capsys):
    config = workspace(max_steps=1)
    qtarget("train", config, "--resume", "true")
    assert summary_of(tmp_path / "out")["resumed_from"] is None
    for extra in ([], ["--resume", "true"]):
        assert "finished run without checkpoints" in refused(capsys, "train", config, *extra)


def test_lora_trains_the_adapter_alone(workspace, tmp_path):
    qtarget("train", workspace(max_steps=1), "--use_peft", "--lora_r", "2", "--lora_target_modules", "[q_proj]")
    names = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert {name.split(".")[-3] for name in names} == {"q_proj"}
    assert {name.split(".")[-2] for name in names} == {"lora_A", "lora_B"}


def test_a_frozen_model_that_is_nowhere_is_one_block(workspace, tmp_path, capsys, caplog):
    nowhere = refused(capsys, "train", workspace(target="distillation", teacher="nobody/nothing"))
    assert "nobody/nothing is no folder here" in caplog.text
    assert "teacher model nobody/nothing cannot be loaded" in nowhere
    named = workspace(teacher_model_name_or_path="nobody/nothing")
    assert "teacher_model_name_or_path nobody/nothing cannot be loaded" in refused(
        capsys, "score", named, "--role", "teacher", "--output", str(tmp_path / "cache")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="bfloat16 is refused without a GPU")
def test_bfloat16_without_a_gpu_is_refused_with_what_helps(workspace, capsys):
    assert "`bf16: false` computes in float32" in refused(capsys, "train", workspace(bf16=True, use_cpu=False))


def test_what_is_wrong_with_config_or_data_is_one_block(workspace, tmp_path, capsys):
    assert "did you mean learning_rate" in refused(capsys, "train", workspace(), "--learning_rte", "1")
    assert "validation_file" in refused(capsys, "train", workspace(), "--eval_strategy", "steps")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "config.json").write_text("{}")
    for name in (odd, "nobody/nothing"):
        assert f"model_name_or_path {name} cannot be loaded" in refused(
            capsys, "train", workspace(model_name_or_path=str(name))
        )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    errors = refused(capsys, "train", workspace())
    assert errors.startswith("DataError: ")
    assert "rows.jsonl, line 2" in errors
    assert "qtarget --debug" in errors
    with pytest.raises(ValueError, match="line 2"):
        run(["--debug", "train", str(workspace())])
    assert not (tmp_path / "out").exists()


def test_truncated_rows_are_in_the_summary(workspace, tmp_path):
    qtarget("train", workspace(max_steps=1, max_length=7))
    # "i+1=" + (i + 1) + eos: 6 characters below 9, 7 for 9, 8 for 10 and 11
    warnings = summary_of(tmp_path / "out")["warnings"]
    assert len(warnings) == 1
    assert "2 of 12 rows are truncated" in warnings[0]
    assert "rows 11, 12" in warnings[0]


def test_the_summary_takes_first_and_last_training_lines():
    log = [
        {"step": 1, "eval_loss": 9.0},
        {"step": 2, "loss": 2.0, "nll": 2.0},
        {"step": 4, "loss": 1.0, "nll": 1.0},
        {"step": 5, "train_loss": 7, "nll": 0.5},
    ]
    found = summarize(log, {"eval_nll": 0.5, "eval_runtime": 3.0})
    assert found == {
        "first_loss": 2.0,
        "last_loss": 1.0,
        "first_nll": 2.0,
        "last_nll": 0.5,
        "logged": {"loss": [2, 4], "nll": [2, 5]},
        "eval_nll": 0.5,
    }
