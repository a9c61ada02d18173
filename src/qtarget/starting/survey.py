"""Rows as training sees them: tokens, and whether training would take them at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from qtarget.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from qtarget.integrations.sft.config import QTargetConfig


@dataclass(frozen=True)
class Survey:
    """Lengths of tokenised rows.

    Attributes:
        lengths: tokens of each row, whole.
        trained: tokens of all rows that are trained.
        untrained_rows: rows without such a token.
        notes: what training will say of the rows.
    """

    lengths: list[int]
    trained: int
    untrained_rows: int
    notes: list[str]


def survey(args: QTargetConfig, rows: Dataset, tokenizer: Any) -> Survey:
    """Tokenise as training does.

    Raises:
        DataError: rows that training refuses; says which and what to do.
        ConfigError: settings that TRL refuses for them.
    """
    from qtarget.integrations.sft.audit import tokenise

    tokens = tokenise(args, rows, tokenizer)
    errors = [found.message for found in tokens.findings if found.severity == "error"]
    if errors or tokens.rows is None:
        raise DataError("training would refuse these rows: " + "; ".join(errors or ["they cannot be tokenised"]))
    labels = [np.asarray(row["labels"]) for row in tokens.rows]
    trained = [int(np.count_nonzero(values[1:] != -100)) for values in labels]
    if not any(trained):
        raise DataError("no token of any row would be trained; look at `qtarget audit-data` of these rows")
    return Survey(
        [len(row["input_ids"]) for row in tokens.rows],
        sum(trained),
        trained.count(0),
        [found.message for found in tokens.findings if found.severity == "warning"],
    )


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row in TRL's shape needs a chat template."""
    return row.get("messages") is not None or isinstance(row.get("prompt"), list)


def answers_alone(args: QTargetConfig, rows: Dataset, tokenizer: Any) -> Survey | None:
    """The survey with ``assistant_only_loss``; None where the template does not mark answers, or marks none."""
    from qtarget.integrations.sft.preparation import changed

    try:
        found = survey(changed(args, assistant_only_loss=True), rows, tokenizer)
    except (ConfigError, DataError):
        return None
    return found if found.untrained_rows == 0 else None


def chat_template() -> str:
    """The template for a model without one: ChatML, with the tokenizer's own end token behind answers."""
    return files("qtarget.starting").joinpath("chatml.jinja").read_text(encoding="utf-8")


def spread(lengths: Sequence[int]) -> str:
    """Shortest, median and longest in words.

    Example:
        >>> spread([5, 9, 30])
        '5 .. 30 tokens, median 9'
    """
    return f"{min(lengths):,} .. {max(lengths):,} tokens, median {int(np.median(lengths)):,}"
