"""`qtarget train` scores the base where a target needs it and no key names one; one key a frozen model, old names the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("trl")

from qtarget.cli.main import run
from qtarget.cli.options.config import load_config
from qtarget.core.errors import ConfigError
from qtarget.scoring.cache.reader import ReferenceCache


def called(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def losses(folder: Path) -> tuple[float, float]:
    summary = json.loads((folder / "train_summary.json").read_text())
    return summary["first_loss"], summary["last_loss"]


def test_the_base_is_scored_once_and_the_next_target_takes_it(workspace, tmp_path, caplog):
    runs = tmp_path / "runs"
    config = workspace(validation_file="held_out.jsonl", output_dir=str(runs / "asft"))
    assert called("train", config, "--target", "asft") == 0
    (cache,) = runs.glob("reference_cache-*")
    manifest = ReferenceCache.open(cache).manifest
    supervised = sum(len(str(i + 1)) + 1 for i in [*range(12), *range(50, 54)])
    assert (manifest.rows, manifest.tokens, manifest.top_k) == (16, supervised, 32)
    assert f"scored once for target asft: 16 rows, {supervised} tokens, about" in caplog.text
    assert "your rows: " in caplog.text
    written = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")}
    caplog.clear()
    assert called("train", config, "--target", "sft_kl", "--output_dir", runs / "sft_kl") == 0
    assert "scored once" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in cache.glob("shard-*")} == written
    assert called("train", config, "--target", "asft", "--reference", "live", "--output_dir", runs / "live") == 0
    # 32 of 98 tokens and a tail against all of them: the first loss is the same but for the anchor, which begins at 0
    assert losses(runs / "asft")[0] == pytest.approx(losses(runs / "live")[0], abs=1e-3)


def test_other_rows_are_another_cache_and_sft_needs_none(workspace, tmp_path):
    runs = tmp_path / "runs"
    config = workspace(output_dir=str(runs / "a"), max_steps=1)
    assert called("train", config, "--target", "sft") == 0
    assert not list(runs.glob("reference_cache-*"))
    assert called("train", config, "--target", "asft", "--output_dir", runs / "b") == 0
    rows = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(rows.replace('"0+1="', '"9+9="'))
    assert called("train", config, "--target", "asft", "--output_dir", runs / "c") == 0
    assert len(list(runs.glob("reference_cache-*/manifest.json"))) == 2


def test_score_writes_where_train_looks(workspace, tmp_path, caplog, capsys):
    runs = tmp_path / "runs"
    config = workspace(output_dir=str(runs / "a"), max_steps=1)
    assert called("score", config) == 0
    (cache,) = runs.glob("reference_cache-*")
    assert called("train", config, "--target", "asft") == 0
    assert "is taken, which these rows and this model were scored into" in caplog.text
    assert list(runs.glob("reference_cache-*")) == [cache]
    assert called("audit-data", config) == 0
    assert "the base's surprise at the labels is" in capsys.readouterr().out


def test_a_scored_teacher_is_taken_instead_of_a_live_one(workspace, tmp_path, tiny_model, caplog):
    runs = tmp_path / "runs"
    config = workspace(output_dir=str(runs / "a"), max_steps=1, teacher=str(tiny_model), target="distillation")
    assert called("score", config, "--role", "teacher") == 0
    assert called("train", config) == 0
    assert "nothing runs live" in caplog.text


@pytest.mark.parametrize("role", ["reference", "teacher"])
def test_old_names_are_the_same(role, workspace, tmp_path, tiny_model):
    keys = {role: str(tiny_model)}
    one = load_config(workspace(**keys)).training
    other = load_config(workspace(**{f"{role}_model_name_or_path": str(tiny_model)})).training
    assert getattr(one, f"{role}_model_name_or_path") == getattr(other, f"{role}_model_name_or_path") == str(tiny_model)
    with pytest.raises(ConfigError, match="keep one of them"):
        load_config(workspace(**keys, **{f"{role}_cache": "cache"}))


def test_lists_as_trl_takes_them(workspace):
    config = workspace(use_peft=True)
    for options, expected in (
        (["--lora_target_modules", "q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["--lora_target_modules", "q_proj"], ["q_proj"]),
        (["--lora_target_modules", "[q_proj, v_proj]", "--seed", "1"], ["q_proj", "v_proj"]),
    ):
        assert load_config(config, options).model.lora_target_modules == expected
    with pytest.raises(ConfigError, match="learning_rate takes one value"):
        load_config(config, ["--learning_rate", "1", "2"])


def test_nothing_of_ours_makes_a_library_warn(workspace, tmp_path, recwarn, caplog):
    config = workspace(max_steps=2, activation_checkpointing=...)
    assert called("train", config) == 0
    assert [
        str(found.message)
        for found in recwarn
        if "deprecat" in str(found.message) or "pin_memory" in str(found.message)
    ] == []
    assert yaml.safe_load((tmp_path / "out" / "qtarget_config.yaml").read_text())["target"] == "sft"
