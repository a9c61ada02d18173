"""The weights of training tokens: all that the data and the config say of them, as one factor a token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from transformers.utils import logging

from qtarget.core.errors import ConfigError, DataError, counted
from qtarget.core.types import Target
from qtarget.data.checks.findings import named
from qtarget.data.columns import message_token_weights, parsed_weight, row_loss_weights, without_weights
from qtarget.data.fields import PRIVATE
from qtarget.data.spans import UnplacedSpansError, conversation_of, marked_texts, spans_in_row
from qtarget.integrations.sft.data.arrow import flat_lists

logger = logging.get_logger(__name__)

ROW = f"{PRIVATE}row"
"""The row's number in the user's data, whatever ids the data has of its own."""
CONVERSATIONS = ("messages", "prompt", "completion")
WEIGHT_KEYS = ("weight", "weight_spans")


@dataclass(frozen=True)
class Weighting:
    """Which weights a data set carries.

    Attributes:
        rows: a ``weight`` a row.
        tokens: ``loss_weights`` a token.
        text: a ``weight`` or ``weight_spans`` a message, or ``weight_spans`` a row.
    """

    rows: bool
    tokens: bool
    text: bool

    def __bool__(self) -> bool:
        return self.rows or self.tokens or self.text

    @classmethod
    def of(cls, dataset: Dataset) -> Weighting:
        """Look through all rows: a key in any of them counts, and one that is null everywhere does not."""
        rows, tokens, spans = (_has_values(dataset, name) for name in ("weight", "loss_weights", "weight_spans"))
        return cls(rows, tokens, spans or any(_messages_weigh(dataset, name) for name in CONVERSATIONS))


def _has_values(dataset: Dataset, name: str) -> bool:
    return name in dataset.column_names and dataset.data.column(name).null_count < len(dataset.data.column(name))


def _messages_weigh(dataset: Dataset, name: str) -> bool:
    if name not in dataset.column_names or isinstance(dataset.features[name], Value):
        return False
    column = dataset.data.column(name)
    if pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type):
        keys = {field.name for field in column.type.value_type} & set(WEIGHT_KEYS)
        flat = [chunk.flatten() for chunk in column.chunks] if keys else []
        return any(chunk.field(key).null_count < len(chunk) for chunk in flat for key in keys)
    rows: Any = dataset.select_columns([name])  # messages kept as JSON: Arrow has no struct of them
    messages = (m for row in rows if isinstance(row[name], list) for m in row[name] if isinstance(m, Mapping))
    return any(m.get(key) is not None for m in messages for key in WEIGHT_KEYS)


@contextmanager
def _in_row(number: int) -> Iterator[None]:
    """Errors about the data name the row."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"row {number + 1}: {error}") from error


def row_factors(dataset: Dataset) -> np.ndarray:
    """``[rows]`` the ``weight`` of each row; 1 where it has none.

    Raises:
        DataError: a weight is no finite number of at least 0, by row.
    """
    column, numbers = dataset["weight"][:], dataset[ROW][:]
    found = np.ones(len(column))
    for i, (value, number) in enumerate(zip(column, numbers, strict=True)):
        with _in_row(number):
            weight = parsed_weight(value, "weight")
        found[i] = 1.0 if weight is None else weight
    return found


def check_weights(dataset: Dataset, target: Target, args: Any) -> None:
    """Read the data's weights before anything is tokenised.

    Raises:
        DataError: a row's ``weight`` or ``weight_spans`` are no such thing, by row.
        ConfigError: weights on the label term of a target that has none.
    """
    weighting = Weighting.of(dataset)
    weighed = bool(weighting) or args.prompt_weight is not None
    if weighed and args.weights_scale == "label" and not target.has_label_term:
        raise ConfigError(
            f"weights_scale: label multiplies the pull towards the observed token, and target {target.name!r} has none; use "
            "weights_scale: all, or drop the weights"
        )
    if weighting.rows:
        row_factors(dataset)
    if weighting.text:
        columns = [c for c in (*CONVERSATIONS, "weight_spans", ROW) if c in dataset.column_names]
        rows: Any = dataset.select_columns(columns)
        for row in rows:
            with _in_row(row[ROW]):
                marked_texts(row)


# -- by the text -------------------------------------------------------------------------------------------------


def text_weights(row: Mapping[str, Any], tokenizer: Any, chat_template: str | None) -> list[float] | None:
    """The factor on each token by message ``weight`` and ``weight_spans``; None where the row has neither.

    Args:
        row: with ``input_ids``, not truncated, and the text that they were made of.

    Raises:
        DataError: a weight or a span is no such thing, or the template hides where messages begin.
        UnplacedSpansError: spans whose text is not found in the tokens.
    """
    messages = conversation_of(row)
    tools = row.get("tools")
    options = {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) and tools else tools or None,
        **(row.get("chat_template_kwargs") or {}),
    }

    def render(part: Sequence[Mapping[str, Any]]) -> str:
        return tokenizer.apply_chat_template(without_weights(part), tokenize=False, **options)

    by_span = spans_in_row(row, tokenizer, render)
    if not any(message.get("weight") is not None for message in messages):
        return by_span
    by_message = message_token_weights(tokenizer, messages, row["input_ids"], **options)
    return by_message if by_span is None else [a * b for a, b in zip(by_message, by_span, strict=True)]


def row_weights(row: Mapping[str, Any], tokenizer: Any, chat_template: str | None) -> np.ndarray:
    """The factor on each token of one row: row ``weight`` x message ``weight`` x ``weight_spans`` x ``loss_weights``.

    Raises:
        DataError: as ``text_weights``, and ``loss_weights`` of another length than the tokens.
    """
    out = np.ones(len(row["input_ids"]))
    with _in_row(row[ROW]):
        by_text = text_weights(row, tokenizer, chat_template)
        if by_text is not None:
            out *= by_text
        if row.get("loss_weights") is not None:
            out *= row_loss_weights(row, len(out))
        whole = parsed_weight(row.get("weight"), "weight")
    return out if whole is None else out * whole


def prompt_weights(labels: np.ndarray, prompt_weight: float | None) -> np.ndarray | float:
    """The factor on each token by ``prompt_weight``: on those that the masks leave out."""
    return 1.0 if prompt_weight is None else np.where(labels == -100, prompt_weight, 1.0)


# -- all rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenWeights:
    """The weights of whole rows, before truncation, flat.

    Attributes:
        numbers: ``[rows]`` the row's number in the user's data.
        offsets: ``[rows + 1]``; tokens of row i are ``offsets[i] : offsets[i + 1]``.
        values: ``[tokens]`` float32.
        unplaced: ``[rows]`` whether the row's spans are in none of its tokens.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    unplaced: np.ndarray


def weights_of_rows(tokens: Dataset, tokenizer: Any, chat_template: str | None, args: Any) -> TokenWeights | None:
    """The factor on each token of tokenised rows, not truncated; None where nothing weighs them.

    Raises:
        DataError: see ``row_weights``; ``weight_spans`` that cannot be placed, unless such rows are left out.
        ConfigError: a ``prompt_weight`` where nothing tells the prompt.
    """
    weighting = Weighting.of(tokens)
    if not weighting and args.prompt_weight is None:
        return None
    offsets, labels = flat_lists(tokens, "labels")
    if args.prompt_weight is not None and (labels != -100).all():
        raise ConfigError(
            "prompt_weight weighs the tokens that completion_only_loss or assistant_only_loss masks, and no token is masked; "
            "set one of them, or give rows as prompt and completion"
        )
    values = np.ones(len(labels), np.float32) * np.float32(prompt_weights(labels, args.prompt_weight))
    if weighting.rows:
        values *= np.repeat(row_factors(tokens), np.diff(offsets)).astype(np.float32)
    if weighting.tokens:
        values *= _given_weights(tokens, offsets)
    numbers, unplaced = np.asarray(tokens[ROW][:]), np.zeros(len(tokens), dtype=bool)
    if weighting.text:
        for i, row in enumerate(_weights_by_text(tokens, tokenizer, chat_template, args)):
            unplaced[i] = row["unplaced"] is not None
            if row["by_text"] is not None:
                values[offsets[i] : offsets[i + 1]] *= np.asarray(row["by_text"], dtype=np.float32)
    return TokenWeights(numbers, offsets, values, unplaced)


def _given_weights(tokens: Dataset, offsets: np.ndarray) -> np.ndarray:
    """``loss_weights``, flat; 1 for a row without."""
    kind = tokens.data.column("loss_weights").type
    if pa.types.is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
        starts, flat = flat_lists(tokens, "loss_weights")
        flat = flat.astype(np.float32)
        if np.array_equal(starts, offsets) and bool((np.isfinite(flat) & (flat >= 0)).all()):
            return flat
    out = np.ones(offsets[-1], np.float32)  # row by row: some have none, or one of them is to be named
    rows: Any = tokens.select_columns(["loss_weights", ROW])
    for i, row in enumerate(rows):
        if row["loss_weights"] is not None:
            with _in_row(row[ROW]):
                out[offsets[i] : offsets[i + 1]] = row_loss_weights(row, int(offsets[i + 1] - offsets[i]))
    return out


def _weights_by_text(tokens: Dataset, tokenizer: Any, chat_template: str | None, args: Any) -> Any:
    """For each row ``by_text`` (or None) and ``unplaced``, the reason why its spans are in none of its tokens (or None).

    Raises:
        DataError: some are unplaced, and not to be left out.
    """
    features = Features({"by_text": List(Value("float64")), "unplaced": Value("string")})
    options: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer, "chat_template": chat_template}}
    found = tokens.map(
        _by_text, remove_columns=tokens.column_names, features=features, load_from_cache_file=False,
        num_proc=args.dataset_num_proc, desc="Weighing tokens", **options,
    )  # fmt: skip
    reasons = found["unplaced"][:]
    numbers = [n for n, reason in zip(tokens[ROW][:], reasons, strict=True) if reason is not None]
    if not numbers:
        return found
    first = next(reason for reason in reasons if reason is not None)
    what = f"{len(numbers)} of {counted(len(found), 'row')} have weight_spans that are unplaced ({named(numbers)}): {first}"
    if args.unplaced_spans == "refuse":
        raise DataError(
            f"{what}; weigh their tokens with `loss_weights`, take the spans away, or set unplaced_spans: leave_out to train "
            "without these rows"
        )
    logger.warning(f"{what}; these rows are left out")
    return found


def _by_text(row: dict[str, Any], tokenizer: Any, chat_template: str | None) -> dict[str, Any]:
    with _in_row(row[ROW]):
        try:
            return {"by_text": text_weights(row, tokenizer, chat_template), "unplaced": None}
        except UnplacedSpansError as error:
            return {"by_text": None, "unplaced": str(error)}


def announcement(dataset: Dataset, weights: TokenWeights, prompt_weight: float | None) -> list[str]:
    """What the weights of a data set are, in words: those of rows, and those of trained tokens."""
    weighting = Weighting.of(dataset)
    _, labels = flat_lists(dataset, "labels")
    lines = []
    if weighting.rows:
        factors = row_factors(dataset)
        lines.append(f"weight: {counted(len(factors), 'row')}, {_spread(factors)}")
    if weighting.tokens or weighting.text:
        trained = weights.values[labels != -100]
        if len(trained):
            lines.append(f"weights of tokens: {counted(len(trained), 'trained token')}, {_spread(trained)}")
    if prompt_weight is not None:
        lines.append(f"prompt_weight {prompt_weight:g}: {int((labels == -100).sum()):,} prompt tokens are trained too")
    return lines


def _spread(values: np.ndarray) -> str:
    return f"mean {values.mean():.3g}, smallest {values.min():g}, largest {values.max():g}"
