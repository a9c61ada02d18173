"""What training makes of the user's rows: TRL's preparation in two passes, with our columns carried along."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers.utils import logging
from trl.data_utils import pack_dataset

from qtarget.core.errors import ConfigError, DataError
from qtarget.core.types import Target
from qtarget.data.checks.audit import audit_rows
from qtarget.integrations.sft.arrow import array_rows
from qtarget.integrations.sft.columns import (
    TOKEN_COLUMNS,
    add_data_columns,
    locate_rows,
    trained_rows,
    with_row_ids,
    with_token_columns,
)
from qtarget.integrations.sft.weights import announcement, check_weights, weights_of_rows
from qtarget.integrations.shared.samples import describe_rows
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_tokenizer

logger = logging.get_logger(__name__)


class Preparation:
    """Makes training rows of a data set, and keeps what was found on the way.

    TRL cuts rows where it tokenises them, so what the cut loses cannot be seen afterwards. Here it tokenises whole rows
    first; they are audited and get their columns; then it cuts them.

    Attributes:
        audits: messages about each data set, by its name.
        descriptions: each data set as records name it (``describe_rows``).
    """

    def __init__(self, target: Target, caches: dict[str, ReferenceCache]) -> None:
        self._target, self._caches = target, caches
        self.audits: dict[str, list[str]] = {}
        self.descriptions: dict[str, dict[str, Any]] = {}

    def prepare(
        self,
        dataset: Any,
        name: str,
        *,
        trl: Callable[..., Any],
        args: Any,
        tokenizer: Any,
        chat_template: str | None,
        packing: bool,
        formatting_func: Any,
    ) -> Dataset:
        """Rows with ``input_ids``, ``labels`` and ``TOKEN_COLUMNS``, packed where that is asked for.

        Args:
            trl: ``SFTTrainer._prepare_dataset`` of the trainer.
            chat_template: TRL's training template where it replaces the tokenizer's own.

        Raises:
            DataError: rows that cannot be counted, or nothing to train on.
            ConfigError: packing that cuts cached rows apart.
            CacheMismatchError: rows that a cache does not hold.
        """
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"the {name} data is a {type(dataset).__name__}; expected a datasets.Dataset with rows that can be counted"
            )
        if "row_ids" in dataset.column_names:
            return dataset
        cuts_rows = packing and args.packing_strategy != "bfd"
        if cuts_rows and self._caches:
            raise ConfigError(
                f"packing_strategy {args.packing_strategy!r} cuts rows apart, and cached rows are whole; use 'bfd'"
            )
        whole = changed(args, max_length=None, shuffle_dataset=False)
        numbered = with_row_ids(dataset)
        check_weights(numbered, self._target, args)
        tokens = tokenised(trl, numbered, tokenizer, whole, formatting_func, name)
        self._audit(tokens, changed(args, max_length=None) if cuts_rows else args, name)
        weights = weights_of_rows(tokens, tokenizer, chat_template, args)
        for line in [] if weights is None else announcement(tokens, weights, args.prompt_weight):
            logger.warning(f"{name} data: {line}")
        tokens: Any = trl(tokens, tokenizer, whole if cuts_rows else args, False, None, name)
        tokens = with_token_columns(
            tokens,
            weights,
            keep_end=args.truncation_mode == "keep_end",
            all_tokens=args.prompt_weight is not None,
        )
        zero_masks = args.weights_scale == "all"
        if weights is not None:
            tokens = trained_rows(tokens, weights, zero_masks=zero_masks, name=name)
        self.descriptions[name] = describe_rows(tokens)
        tokens = self._with_frozen(tokens, name, tokenizer, chat_template, zero_masks)
        return packed(tokens, args) if packing else tokens

    def _audit(self, tokens: Dataset, args: Any, name: str) -> None:
        rows = array_rows(tokens, "input_ids", "labels")
        report = audit_rows(rows, max_length=args.max_length, keep_end=args.truncation_mode == "keep_end")
        self.audits[name] = report.messages()
        for message in self.audits[name]:
            logger.warning(f"{name} data: {message}")
        report.raise_if_unusable()

    def _with_frozen(
        self, tokens: Dataset, name: str, tokenizer: Any, chat_template: str | None, zero_masks: bool
    ) -> Dataset:
        for role, cache in self._caches.items():
            cache.require(
                tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
                chat_template_fingerprint=fingerprint_chat_template(chat_template or tokenizer),
            )
            tokens = locate_rows(tokens, cache, role, name)
            needed = getattr(self._target.needs, role)
            tokens = add_data_columns(tokens, cache, role, needed, zero_masks=zero_masks)
        return tokens


def tokenised(
    trl: Callable[..., Any], dataset: Dataset, tokenizer: Any, args: Any, formatting_func: Any, name: str
) -> Any:
    """TRL's tokens of whole rows; its error about assistant tokens says what to do.

    Raises:
        DataError: ``assistant_only_loss``, and rows without a single assistant token.
    """
    try:
        return trl(dataset, tokenizer, args, False, formatting_func, name)
    except RuntimeError as error:
        if "assistant" not in str(error):
            raise
        raise DataError(
            f"the {name} data has rows without a single assistant token under assistant_only_loss; mark assistant "
            "text with {% generation %} ... {% endgeneration %} in the chat template, or drop those rows"
        ) from error


def packed(tokens: Dataset, args: Any) -> Dataset:
    """Rows packed by TRL to ``max_length``, with our columns.

    Raises:
        ConfigError: there is no ``max_length``.
    """
    columns = [c for c in ("input_ids", "labels", *TOKEN_COLUMNS) if c in tokens.column_names]
    if args.max_length is None:
        raise ConfigError("packing fills rows of max_length tokens; set max_length")
    rows = pack_dataset(tokens.select_columns(columns), args.max_length, args.packing_strategy)
    return (
        rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
    )  # the order of packed rows follows their lengths


def changed(args: Any, **values: Any) -> Any:
    """A shallow copy with some fields set (dataclasses.replace would run TrainingArguments' set-up again)."""
    changed = copy.copy(args)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
