"""Rows as training sees them: tokens, and whether training would take them at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.checks.audit import AuditReport, audit_columns
from qtarget.data.checks.flat import FlatRows

if TYPE_CHECKING:
    from datasets import Dataset

    from qtarget.integrations.sft.config import QTargetConfig


@dataclass(frozen=True)
class Survey:
    """Tokenised rows, whole.

    Attributes:
        tokens: of all rows.
        notes: what training will say of the rows before it cuts them.
    """

    tokens: FlatRows
    notes: list[str]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.tokens.lengths.tolist()

    def cut(self, args: QTargetConfig, length: int | None, rows: Sequence[int] | None = None) -> AuditReport:
        """What ``max_length`` leaves of the rows, or of some of them, in the words of training.

        Args:
            args: the run's; ``wrapped`` packing joins rows and cuts none off.
            length: ``max_length``.
            rows: their numbers.
        """
        flat = self.tokens
        chosen = np.ones(len(flat), dtype=bool) if rows is None else np.isin(np.arange(len(flat)), rows)
        joined = args.packing and args.packing_strategy != "bfd"
        return audit_columns(
            flat.lengths[chosen],
            flat.labels[chosen[flat.rows]],
            max_length=None if joined else length,
            keep_end=args.truncation_mode == "keep_end",
        )


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
    flat = FlatRows.of(tokens.rows)
    if not flat.trained.any():
        raise DataError("no token of any row would be trained; look at `qtarget audit-data` of these rows")
    return Survey(flat, [found.message for found in tokens.findings if found.severity == "warning"])


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
    return found if found.tokens.trained_counts.all() else None


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
