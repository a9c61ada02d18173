"""The table of constraints: each key is one that a config has, its own default passes, and what is outside does not."""

from __future__ import annotations

from dataclasses import fields

import pytest
from trl import ModelConfig

from qtarget import QTargetConfig
from qtarget.core.errors import ConfigError
from qtarget.integrations.shared.numbers import CONSTRAINTS, check_numbers

KNOWN = {field.name for config in (QTargetConfig, ModelConfig) for field in fields(config)}


def test_every_key_is_one_of_a_config(tmp_path) -> None:
    assert set(CONSTRAINTS) <= KNOWN
    check_numbers(QTargetConfig(output_dir=str(tmp_path), bf16=False))
    check_numbers(ModelConfig())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("learning_rate", -1e-4, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("weight_decay", float("inf"), "at least 0"),
        ("adam_beta2", 1.5, "at least 0 and at most 1"),
        ("num_train_epochs", 0, "more than 0"),
        ("max_steps", 0, "at least 1, or -1"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", -2, "at least 1"),
        ("max_length", 1, "at least 2"),
        ("save_total_limit", 0, "at least 1"),
        ("teacher_top_k", 0, "at least 1"),
    ],
)
def test_numbers_outside_are_named_with_what_was_expected(key, value, expected, tmp_path) -> None:
    with pytest.raises(ConfigError, match=f"{key} is {value:g}, expected {expected}"):
        QTargetConfig(output_dir=str(tmp_path), bf16=False, **{key: value})


def test_all_of_them_in_one_error(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate is -1, .*; max_length is 0, "):
        QTargetConfig(output_dir=str(tmp_path), bf16=False, learning_rate=-1.0, max_length=0)
