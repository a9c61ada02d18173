"""What is asked of a trainer, checked before a model is loaded or a row is read."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin, TrainingArguments
from transformers.utils import logging
from trl.data_utils import is_conversational

from qtarget.core.errors import ConfigError, DataError, UnsupportedModelError
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.shared.teacher import LIVE

logger = logging.get_logger(__name__)

IMAGE_COLUMNS = ("image", "images", "pixel_values")


def own_config(args: TrainingArguments | None, model: Any) -> QTargetConfig:
    """The configuration as ``QTargetConfig``; TRL's defaults without one.

    Raises:
        ConfigError: something else was given.
    """
    name = model if isinstance(model, str) else str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if args is None:
        return QTargetConfig(f"{(name or 'model').rstrip('/').split('/')[-1]}-SFT")
    if isinstance(args, QTargetConfig):
        run_live(args, name)
        return args
    if isinstance(args, TrainingArguments):
        return QTargetConfig.from_trl(args)
    raise ConfigError(f"args is a {type(args).__name__}; expected qtarget.QTargetConfig, or TRL's SFTConfig")


def run_live(args: QTargetConfig, name: str) -> None:
    """``reference: live``: the frozen base is the model of that name, as it is before training.

    Raises:
        ConfigError: the model has no name, or a longer key is set too.
    """
    if args.reference != LIVE:
        return
    other = args.reference_cache or args.reference_model_name_or_path
    if other is not None and other != name:
        raise ConfigError(f"reference: live and {other} are both set; keep one of them")
    if not name:
        raise ConfigError("reference: live needs a model by name; pass reference_model, or name the model's folder")
    args.reference_model_name_or_path = name


def refuse_arguments(args: QTargetConfig, data_collator: Any, compute_loss_func: Any, processing_class: Any) -> None:
    """Refuse what would bypass the target, and what it has no reading of.

    Raises:
        ConfigError, UnsupportedModelError: see the message.
    """
    if isinstance(data_collator, Dataset | IterableDataset):
        raise ConfigError(
            "the third argument is data_collator, as in TRL, and it is a data set; pass train_dataset by its name"
        )
    for name, value in (("compute_loss_func", compute_loss_func), ("data_collator", data_collator)):
        if value is not None:
            raise ConfigError(f"{name} would bypass the target; leave it out, or use TRL's SFTTrainer")
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError(
            "skip_prepare_dataset leaves rows unnumbered; leave it out: tokenised rows are taken as they are"
        )
    if (args.packing or args.eval_packing) and args.max_length is None:
        raise ConfigError("packing fills rows of max_length tokens; set max_length")
    if isinstance(processing_class, ProcessorMixin):
        raise UnsupportedModelError(
            f"processing_class is a {type(processing_class).__name__}, which reads images or sound; a target is about text "
            "tokens: pass the tokenizer of a text model, or use TRL's SFTTrainer"
        )


def text_datasets(args: QTargetConfig, train: Any, evals: Any, cached: bool, called: str = "train") -> tuple[Any, Any]:
    """Both data sets, checked, without image columns that hold nothing.

    Args:
        evals: a data set, several by name, or None.
        cached: the target reads a cache, whose rows are found in the whole data set.
        called: what messages call the first of them.

    Raises:
        DataError: no data, no rows, or images.
        ConfigError: a stream where one cannot be used.
    """
    if train is None:
        raise DataError("`train_dataset` is required; pass a datasets.Dataset or IterableDataset")
    if isinstance(train, IterableDataset) and args.max_steps <= 0:
        raise ConfigError("the train data is a stream, whose length is unknown; set max_steps")
    checked = _text_dataset(train, called, cached)
    if isinstance(evals, dict):
        return checked, {name: _text_dataset(dataset, name, cached) for name, dataset in evals.items()}
    return checked, None if evals is None else _text_dataset(evals, "eval", cached)


def refuse_unmarked(args: QTargetConfig, dataset: Any) -> None:
    """Refuse ``assistant_only_loss`` for rows without messages, which TRL would do in its own words.

    Raises:
        ConfigError: the first row holds text or tokens.
    """
    first = next(iter(dataset), None) if args.assistant_only_loss else None
    if first is None or is_conversational(first):
        return
    held, step = "text", "give messages instead"
    if "input_ids" in first:
        held, step = "token ids", "mask them with labels or assistant_masks, which are read without it"
    raise ConfigError(
        f"assistant_only_loss: true trains what a chat template marks as the assistant's, and these rows are {held}; leave "
        f"it out, and {step}"
    )


def _text_dataset(dataset: Any, name: str, cached: bool) -> Any:
    if not isinstance(dataset, Dataset | IterableDataset):
        raise DataError(
            f"the {name} data is a {type(dataset).__name__}; expected a datasets.Dataset or IterableDataset"
        )
    if isinstance(dataset, IterableDataset):
        return _text_stream(dataset, name, cached)
    if not len(dataset):
        raise DataError(f"the {name} data has no rows; check the path and the split")
    for column in [c for c in IMAGE_COLUMNS if c in dataset.column_names]:
        row = next((i for i, value in enumerate(dataset[column]) if _holds(value)), None)
        if row is not None:
            raise _image_error(name, row, column)
        logger.warning(f"{name} data: column {column!r} is empty in every row, and is left out")
        dataset = dataset.remove_columns(column)
    return dataset


def _text_stream(dataset: IterableDataset, name: str, cached: bool) -> IterableDataset:
    if cached:
        raise ConfigError(
            f"the {name} data is a stream, and a cache is looked up by whole data sets; load it whole (streaming=False), or "
            "run the frozen model live (reference: live, teacher: MODEL)"
        )
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"the {name} data has no rows; check the path and the split")
    for column in IMAGE_COLUMNS:
        if _holds(first.get(column)):
            raise _image_error(name, 0, column)
    empty = [c for c in IMAGE_COLUMNS if c in first]
    return dataset.remove_columns(empty) if empty else dataset


def _holds(value: Any) -> bool:
    return value is not None and not (isinstance(value, list) and not any(_holds(item) for item in value))


def _image_error(name: str, row: int, column: str) -> DataError:
    return DataError(
        f"the {name} data, row {row + 1}: column {column!r} holds an image; a target is about text tokens: leave the column "
        "out, or use TRL's SFTTrainer"
    )
