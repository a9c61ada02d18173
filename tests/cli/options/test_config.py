"""Config files as users write them: keys, types, paths and combinations."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from qtarget.cli.options.config import (
    OTHER_NAMES,
    SWITCHED_OFF,
    DataConfig,
    RunConfig,
    load_config,
    refuse_unknown,
    resolved_settings,
)
from qtarget.cli.options.settings import Setting
from qtarget.core.errors import ConfigError, QTargetError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")

BASE = {"model_name_or_path": "some/model", "train_file": "rows.jsonl", "bf16": False, "output_dir": "out"}


@pytest.fixture
def config(tmp_path):
    """Write a config and load it: keyword arguments are keys, positional ones overrides."""

    def load(*overrides: str, **keys) -> RunConfig:
        path = tmp_path / "configs" / "run.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump({key: value for key, value in (BASE | keys).items() if value is not ...}))
        return load_config(path, overrides)

    return load


def test_keys_go_to_the_class_that_knows_them(config):
    run = config(
        "--learning_rate", "1e-4", "--lora_target_modules", "[q_proj, v_proj]", "--target_kwargs={alpha: 1e-1}",
        target="p_power", eval_strategy="no", num_train_epochs=2, save_strategy="epoch", use_peft=True,
        dtype="bfloat16", max_length=64, warmup_steps=0.1, report_to=["tensorboard"], dataset_train_split="half",
    )  # fmt: skip
    assert (run.training.learning_rate, run.training.num_train_epochs, run.training.max_length) == (1e-4, 2.0, 64)
    assert (run.training.target, run.training.target_kwargs) == ("p_power", {"alpha": 0.1})
    assert run.training.build_target().alpha == 0.1
    assert (run.training.save_strategy, run.training.eval_strategy) == ("epoch", "no")
    assert (run.model.use_peft, run.model.lora_target_modules, run.model.dtype) == (
        True,
        ["q_proj", "v_proj"],
        "bfloat16",
    )
    assert (run.data.train_file, run.data.resume, run.data.dataset_train_split) == ("rows.jsonl", False, "half")


def test_a_guarded_target_keeps_its_hyper_parameters(config):
    from qtarget import Guarded, get_target

    run = config(target="asft", guard=True, target_kwargs={"kl_weight": 0.2})
    assert run.training.build_target() == Guarded(get_target("asft", kl_weight=0.2))
    assert run.training.target_label == "guarded asft"
    again = config("--guard", "false", target="asft", guard=True, target_kwargs={"kl_weight": 0.2})
    assert again.training.build_target() == get_target("asft", kl_weight=0.2)
    assert again.training.target_label == "asft"
    with pytest.raises(QTargetError, match="guard"):
        config(target="asft", guarded=True)


def test_inspect_shows_the_target_as_it_is_trained(config):
    from qtarget import Guarded, get_target
    from qtarget.cli.inspect import parse_targets

    guarded = Guarded(get_target("asft", kl_weight=0.2))
    run = config(target="asft", guard=True, target_kwargs={"kl_weight": 0.2})
    assert parse_targets(None, run) == {"sft": get_target("sft"), "guarded asft": guarded}
    plain = {"asft(kl_weight=0.3)": get_target("asft", kl_weight=0.3), "guarded asft": guarded}
    assert parse_targets("asft(kl_weight=0.3),asft", run) == plain
    unguarded = config(target="asft", target_kwargs={"kl_weight": 0.2})
    assert parse_targets("asft", unguarded) == {"asft": get_target("asft", kl_weight=0.2)}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("learning_rat", "learning_rate"), ("lora_alfa", "lora_alpha"), ("lr", "learning_rate"),
        ("trian_file", "train_file"),
        ("refrence_cache", "reference_cache"), ("max_seq_length", "max_length"),
        ("batch_size", "per_device_train_batch_size"),
    ],
)  # fmt: skip
def test_unknown_keys_name_the_nearest_known_one(config, key, near):
    for load in (lambda: config(**{key: 1}), lambda: config(f"--{key}", "1")):
        with pytest.raises(ConfigError, match=f"unknown key '{key}' .*did you mean {near}"):
            load()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_rank", "did you mean lora_r?"), ("val_size", "here it is `validation_file`; `qtarget init"),
        ("eaft_alpha", "here it is `target_kwargs: {alpha: ...}`"), ("train_on_inputs", "here it is `completion_only_loss: false`"),
    ],
)  # fmt: skip
def test_keys_of_other_tools_are_told_what_they_are_here(config, key, words):
    with pytest.raises(ConfigError) as told:
        config(**{key: 1})
    assert words in str(told.value) and "docs/migrate.md" in str(told.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train_on_inputs", False, "here it is `completion_only_loss: true`, in chats `assistant_only_loss: true`"),
        ("use_dft_loss", False, "here it is nothing: leave it out"),
        ("finetuning_type", "full", "here it is nothing: all weights are trained without `use_peft`"),
        ("finetuning_type", "lora", "here it is `use_peft: true`"),
    ],
)
def test_what_another_tools_key_says_counts(config, key, value, words):
    with pytest.raises(ConfigError) as told:
        config(**{key: value})
    assert words in str(told.value)


def test_keys_of_an_adapter_without_an_adapter_are_named(config, caplog):
    config(lora_r=8)
    assert "lora_r: without use_peft: true all weights are trained" in caplog.text
    caplog.clear()
    config(lora_r=8, use_peft=False), config(lora_r=8, use_peft=True), config()
    assert "use_peft" not in caplog.text


def test_one_text_stands_for_a_list_of_one(config):
    assert config(lora_target_modules="all-linear").model.lora_target_modules == "all-linear"
    assert config(lora_target_modules="q_proj").model.lora_target_modules == ["q_proj"]
    with pytest.raises(ConfigError, match=r"'q_proj,v_proj' in .*expected a list \(text\)"):
        config(lora_target_modules="q_proj,v_proj")


def test_rl_is_not_told_of_targets_of_demonstrations():
    known = ["target", "use_peft", "num_generations"]
    for key, words in (
        ("use_dft_loss", ""),
        ("train_on_inputs", ""),
        ("finetuning_type", "here it is `use_peft: true`"),
    ):
        with pytest.raises(ConfigError) as told:
            refuse_unknown({key: Setting(True, "rl.yaml")}, known, "GRPOConfig")
        assert words in str(told.value) and ("here it is" in str(told.value)) == bool(words)


def test_what_other_keys_are_called_here_is_true():
    """Each is a key that training or `rl` knows, a setting that builds, or words; and none of ours hides behind one."""
    from trl import ModelConfig

    from qtarget import QTargetConfig, QTargetGRPOConfig

    ours_of = [{field.name for field in fields(one)} for one in (QTargetConfig, ModelConfig, DataConfig)]
    trained = set.union(*ours_of)
    known = trained | {field.name for field in fields(QTargetGRPOConfig)}
    for theirs, ours in [*OTHER_NAMES.items(), *SWITCHED_OFF.items()]:
        assert ours in known or not ours.isidentifier(), (theirs, ours)
        for setting in re.findall("`([a-z_]+): ", ours):
            assert setting in known, (theirs, ours)
    assert not (set(OTHER_NAMES) - {"max_length"}) & trained


def test_a_hyperparameter_at_the_top_is_sent_to_target_kwargs(config):
    with pytest.raises(ConfigError, match=r"'kl_weight' .*write target_kwargs: \{kl_weight: ...\}"):
        config("--kl_weight", "0.1", target="dft+sft_kl")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"learning_rate": "fast"}, "learning_rate is 'fast' in .*run.yaml, expected a number"),
        ({"num_train_epochs": True}, "expected a number"),
        ({"max_steps": 1.5}, "max_steps is 1.5 .*expected an integer"),
        ({"packing": "maybe"}, "expected true or false"),
        ({"dtype": "int8"}, "dtype is 'int8' .*expected one of auto, bfloat16"),
        ({"save_strategy": "sometimes"}, "expected one of no, steps, epoch, best"),
        ({"loss_type": "dft"}, "the loss is chosen by `target`"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "ModelConfig refuses this combination"),
        ({"train_file": ...}, "neither is given"),
        ({"dataset_name": "a/b"}, "both are given"),
        ({"train_file": ..., "dataset_name": "a/b", "validation_file": "x.jsonl"}, "use dataset_test_split"),
        ({"model_name_or_path": ...}, "model_name_or_path is missing"),
        ({"model_name_or_path": "./nowhere"}, "there is no folder ./nowhere in .* or in .*; "),
        ({"target_kwargs": "{alpha"}, "target_kwargs"),
    ],
)
def test_wrong_values_are_refused_before_any_model_is_loaded(config, keys, words):
    with pytest.raises(QTargetError, match=words):
        config(**keys)


def test_paths_are_looked_up_beside_the_config_then_here_else_left_alone(config, tmp_path, monkeypatch):
    here = tmp_path / "here"
    for folder, names in ((tmp_path / "configs", ["both.jsonl"]), (here, ["both.jsonl", "only_here.jsonl", "base"])):
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("")
    monkeypatch.chdir(here)
    run = config(
        train_file="both.jsonl", validation_file="only_here.jsonl", model_name_or_path="base", reference_cache="cache"
    )
    assert run.data.train_file == str(tmp_path / "configs" / "both.jsonl")
    assert run.data.validation_file == str(here / "only_here.jsonl")
    assert run.model.model_name_or_path == str(here / "base")
    assert run.training.reference_cache == "cache"
    assert run.training.output_dir == "out"


def test_a_saved_config_loads_to_the_same_run(config, tmp_path):
    run = config(
        "--seed", "7", target="asft", target_kwargs={"kl_weight": 0.1}, lr_scheduler_type="cosine", report_to="none",
        gradient_checkpointing=False, lora_target_modules=["q_proj"], reference_cache="cache", hub_token="secret",
    )  # fmt: skip
    saved = resolved_settings(run)
    assert "secret" not in str(saved)
    assert saved["weight_decay"] == 0.0  # a default is written down too
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(saved))
    again = load_config(path)
    own = {key: value for key, value in run.training.to_dict().items() if key != "hub_token"}
    assert {key: value for key, value in again.training.to_dict().items() if key != "hub_token"} == own
    assert again.model == run.model
    assert again.data == run.data
    assert resolved_settings(again) == saved


def test_the_working_directory_is_not_written_to(config, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    config()
    assert os.listdir(Path.cwd()) == []


def test_a_path_that_is_nowhere_is_named_once(tmp_path, monkeypatch):
    from qtarget.cli.options.config import find_path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    for value, folder, words in (
        ("/nowhere/at/all", tmp_path, "model_name_or_path: there is no folder /nowhere/at/all"),
        ("./nowhere", tmp_path, f"there is no folder ./nowhere in {tmp_path}; "),
        (
            "./nowhere",
            tmp_path / "other",
            f"there is no folder ./nowhere in {tmp_path / 'other'} or in {tmp_path}; ",
        ),
    ):
        with pytest.raises(ConfigError) as raised:
            find_path("model_name_or_path", value, folder)
        assert words in str(raised.value)


def test_a_run_says_what_it_saved(tmp_path):
    from qtarget.cli.options.started import saved_model

    assert saved_model(tmp_path) == "model"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert saved_model(tmp_path) == "adapter"
