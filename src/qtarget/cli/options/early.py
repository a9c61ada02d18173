"""What can be told of a config before transformers and TRL are imported: keys, types, paths, numbers, names, contradictions.

Its rules are those of the full check, called on fields that are read from the sources (``declared``) instead of the classes.
It refuses nothing that the full check takes, and it may let pass what that refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qtarget.cli.options.config import (
    DataConfig,
    build_data,
    drop_other_targets_kwargs,
    field_types,
    read_given,
    without_other_verbs,
)
from qtarget.cli.options.declared import UndeclaredError, declared_fields, declared_target
from qtarget.cli.options.settings import Setting, read_settings
from qtarget.core.errors import ConfigError
from qtarget.data.files import check_file, expand
from qtarget.integrations.shared.loss_keys import check_loss_keys
from qtarget.integrations.shared.numbers import check_numbers
from qtarget.registry import check_names, owner_of

CLASSES = (("qtarget.integrations.sft.config", "QTargetConfig"), ("trl.trainer.model_config", "ModelConfig"))
NO_PLACE = ("live", "auto")


def check_config(path: Path, overrides: Sequence[str] = ()) -> None:
    """Raise for a config that cannot work, in a fraction of a second.

    Raises:
        ConfigError, UnknownTargetError, HyperparameterError, DataError: as ``load_config`` and the verbs would, seconds later.
    """
    check_settings(read_settings(path, overrides), path)


def check_settings(settings: Mapping[str, Setting], path: Path) -> None:
    """``check_config`` of settings that are read already."""
    try:
        fields = [declared_fields(*known) for known in CLASSES]
    except UndeclaredError:  # a package is not installed, or its classes moved: the full check says what is wrong
        return
    hints = {key: (field.hint, field.choices) for known in reversed(fields) for key, field in known.items()}
    given = read_given(
        drop_other_targets_kwargs(without_other_verbs(settings), say=False), field_types(DataConfig) | hints, path
    )
    data = build_data(given, path)
    check_numbers(SimpleNamespace(**given))
    defaults = {"loss_type": "nll", "label_smoothing_factor": 0.0}
    check_loss_keys(SimpleNamespace(**defaults | given))
    check_target_keys(given)
    check_frozen_keys(given)
    check_files(data)


def check_target_keys(given: Mapping[str, Any]) -> None:
    """The target's name and the names of its hyper-parameters, as far as they are ours or stand in a file that is found.

    Raises:
        UnknownTargetError, HyperparameterError: as ``qtarget.get_target``.
    """
    name, kwargs = given.get("target", "sft"), given.get("target_kwargs")
    check_names(name)
    try:
        parts = [set(declared_target(part)) for part in name.split("+")]
    except UndeclaredError:
        return
    for key in kwargs if isinstance(kwargs, dict) else ():
        owner_of(key, name, parts)


def check_frozen_keys(given: Mapping[str, Any]) -> None:
    """A frozen model has one name: the short key, or a cache.

    Raises:
        ConfigError: both are set.
    """
    for role in ("reference", "teacher"):
        value, cache = given.get(role), given.get(f"{role}_cache")
        if value is not None and value not in NO_PLACE and cache is not None:
            raise ConfigError(f"{role}: {value} and {role}_cache: {cache} are both set; keep one of them")


def check_files(data: DataConfig) -> None:
    """Files of rows and of tools are there.

    Raises:
        DataError, ConfigError: one is not.
    """
    for files in (data.train_file, data.validation_file):
        for path in expand(files) if files is not None else ():
            check_file(path)
    if data.tools_file is not None and not Path(data.tools_file).is_file():
        raise ConfigError(f"tools_file: {data.tools_file} is not a file; expected a JSON list of tool schemas")
