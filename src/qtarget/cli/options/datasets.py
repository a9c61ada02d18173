"""The rows that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtarget.cli.options.config import RunConfig
from qtarget.core.errors import ConfigError, DataError
from qtarget.data.loading import load_dataset_file

if TYPE_CHECKING:
    from datasets import Dataset


def load_datasets(config: RunConfig) -> tuple[Dataset, Dataset | None]:
    """Training and validation rows; validation is None if the config names none.

    With ``dataset_name`` the test split is read only if something evaluates it (``eval_strategy``), as TRL does.

    Raises:
        DataError: the files are unusable, or the hub has no such data set or split.
        ConfigError: ``eval_strategy`` without validation rows.
    """
    data, training = config.data, config.training
    evaluates = training.eval_strategy != "no"
    if data.train_file is not None:
        text_field = training.dataset_text_field
        train = load_dataset_file(data.train_file, text_field=text_field)
        if data.validation_file is not None:
            return train, load_dataset_file(data.validation_file, text_field=text_field)
        if evaluates:
            raise ConfigError(
                f"eval_strategy is {str(training.eval_strategy)!r} without validation_file; set it, or "
                "eval_strategy: no"
            )
        return train, None
    return _split(config, data.dataset_train_split), _split(config, data.dataset_test_split) if evaluates else None


def _split(config: RunConfig, split: str) -> Dataset:
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
