"""The rows that a config names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from qtarget.cli.options.config import RunConfig
from qtarget.cli.options.settings import parse_yaml
from qtarget.core.errors import ConfigError, DataError
from qtarget.data.files import Files, expand
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.limits import Limits
from qtarget.data.loading import load_dataset_file, load_tools, read_dataset
from qtarget.data.overlap import shared_rows

if TYPE_CHECKING:
    from datasets import Dataset


ROW_KEYS = ("data_format", "null_content", "roles", "tools_file")
"""Keys of a config that say how rows are read."""

LimitsOption = Annotated[
    str | None, typer.Option("--limits", help="What is refused beyond: '{rows: 20000000, gigabytes: 200}'.")
]

logger = logging.getLogger(__name__)


def row_options(
    data_format: str = "auto",
    null_content: str = "refuse",
    roles: Mapping[str, str] | None = None,
    tools_file: str | None = None,
    limits: Mapping[str, Any] | str | None = None,
    *,
    text_field: str = "text",
) -> ReadOptions:
    """How rows are read, from the keys of a config.

    Raises:
        ConfigError: roles that are no mapping of names, or limits that are none.
        DataError: a tools file that holds no schemas.
    """
    if roles is not None and not all(
        isinstance(v, str) for v in (roles.values() if isinstance(roles, Mapping) else [1])
    ):
        raise ConfigError(f"roles is {roles!r}; expected names of roles, theirs to the template's: {{narrator: user}}")
    tools = load_tools(tools_file) if tools_file is not None else []
    return ReadOptions(text_field, data_format, null_content, dict(roles or {}), tools, read_limits(limits))


def row_settings(config: RunConfig) -> dict[str, Any]:
    """The keys of a config that say how rows are read."""
    training = config.training
    own = {"dataset_text_field": training.dataset_text_field, "limits": training.limits}
    return {key: getattr(config.data, key) for key in ROW_KEYS} | own


def options_of(settings: Mapping[str, Any]) -> ReadOptions:
    """How the rows of a config are read, from its keys, or those that a run recorded.

    Raises:
        ConfigError, DataError: see ``row_options``.
    """
    given = {key: settings[key] for key in (*ROW_KEYS, "limits") if settings.get(key) is not None}
    return row_options(**given, text_field=settings.get("dataset_text_field") or "text")


def options_elsewhere(settings: Mapping[str, Any]) -> ReadOptions:
    """How rows are read that the config does not name, such as ``--forgetting``: in any shape, and without its tools."""
    return options_of({key: value for key, value in settings.items() if key not in ("data_format", "tools_file")})


def load_elsewhere(file: Files, config: RunConfig) -> Dataset:
    """Rows beside those that a config names, as ``options_elsewhere`` has it.

    Raises:
        DataError: see ``load_dataset_file``.
    """
    return load_dataset_file(file, options_elsewhere(row_settings(config)))


def read_limits(given: Mapping[str, Any] | str | None) -> Limits:
    """The limits of a config, or of ``--limits``, which is YAML.

    Raises:
        ConfigError: no mapping of known limits.

    Example:
        >>> read_limits("{rows: 20000000}").rows
        20000000
    """
    if isinstance(given, str):
        try:
            given = parse_yaml(given)
        except yaml.YAMLError as error:
            raise ConfigError(f"--limits {given!r} is not valid YAML ({error}); write '{{rows: 20000000}}'") from error
    return Limits.of(given)


def load_datasets(config: RunConfig, *, overlap: bool = True) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows; validation is None if the config names none.

    With ``dataset_name`` the test split is read only if something evaluates it (``eval_strategy``), as TRL does.

    Args:
        overlap: say which validation rows are training rows too, as the trainer does where one is made of them.

    Raises:
        DataError: the files are unusable, or the hub has no such data set or split.
        ConfigError: ``eval_strategy`` without validation rows, or rows that are trained and validated both.
    """
    data, training = config.data, config.training
    evaluates = training.eval_strategy != "no"
    options = options_of(row_settings(config))
    if data.train_file is None:
        refuse_same_split(config)
        train = read_dataset(dataset_split(config, data.dataset_train_split), options, "train data")
        if not evaluates:
            return train, None
        return train, read_dataset(dataset_split(config, data.dataset_test_split), options, "validation data")
    if data.validation_file is not None:
        refuse_same_files(data.train_file, data.validation_file)
    train = load_dataset_file(data.train_file, options)
    if data.validation_file is not None:
        validation = load_dataset_file(data.validation_file, options)
        for line in shared_rows(train, validation, text_field=options.text_field) if overlap else []:
            logger.warning(line)
        return train, validation
    if evaluates:
        raise ConfigError(
            f"eval_strategy is {str(training.eval_strategy)!r} without validation_file; set it, or eval_strategy: no"
        )
    return train, None


def refuse_same_split(config: RunConfig) -> None:
    """Raise where one split of a data set would be trained and evaluated both.

    Raises:
        ConfigError: it would.
    """
    data = config.data
    if config.training.eval_strategy != "no" and data.dataset_train_split == data.dataset_test_split:
        raise ConfigError(
            f"dataset_train_split and dataset_test_split are both {data.dataset_test_split!r}: what is trained cannot "
            "validate it; name another split, or eval_strategy: no"
        )


def refuse_same_files(train: Files, validation: Files) -> None:
    """Raise where a file is in both lists.

    Raises:
        ConfigError: one is; the same file by another name counts.
    """
    trained = {path.resolve(): path for path in expand(train)}
    both = [path for path in expand(validation) if path.resolve() in trained]
    if both:
        raise ConfigError(
            f"validation_file {both[0]} is train_file too: a validation loss on rows that are trained says nothing about "
            "others; keep some rows apart, or leave validation_file out"
        )


def dataset_split(config: RunConfig, split: str) -> Dataset:
    """A split of the config's ``dataset_name``: of the hub, or of a folder that ``datasets`` can load.

    Raises:
        DataError: there is no such data set or split.
    """
    from datasets import load_dataset

    data = config.data
    assert data.dataset_name is not None, "checked by DataConfig"
    try:
        return load_dataset(data.dataset_name, name=data.dataset_config, split=split)  # pyright: ignore[reportReturnType]
    except (ValueError, OSError, ConnectionError) as error:
        raise DataError(
            f"dataset_name {data.dataset_name!r}, split {split!r}: {error}; check dataset_name, dataset_config, "
            "dataset_train_split and dataset_test_split, or download the rows and use train_file"
        ) from error


def row_files(config: RunConfig, split: str = "train") -> list[str]:
    """Files of a config's rows, or the name of their data set."""
    files = config.data.train_file if split == "train" else config.data.validation_file
    return [*map(str, expand(files))] if files else [str(config.data.dataset_name), split]
