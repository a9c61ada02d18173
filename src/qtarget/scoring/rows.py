"""One row on its way in (token ids and mask) and out (a frozen model's numbers), and who turns one into the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from qtarget.errors import DataError
from qtarget.scoring.schema import row_checksum, supervised_mask


@dataclass(frozen=True)
class Row:
    """A training row.

    Attributes:
        input_ids: ``[time]`` int64.
        positions: ``[tokens]`` int64; the supervised positions, ascending, each at least 1.
        checksum: ``row_checksum`` of it.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    checksum: str


@dataclass(frozen=True)
class ScoredRow:
    """A frozen model's numbers at the supervised tokens of one row, float32, nats.

    Attributes:
        label_log_probs: ``[tokens]``.
        entropy: ``[tokens]``, over the whole vocabulary.
        topk_ids: ``[tokens, k]`` int32, or absent.
        topk_log_probs: ``[tokens, k]``, descending, or absent.
        tail_log_mass: ``[tokens]``, log-probability of all other ids, or absent.
    """

    label_log_probs: np.ndarray
    entropy: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_log_probs: np.ndarray | None = None
    tail_log_mass: np.ndarray | None = None


class Source(Protocol):
    """Whatever can score rows: a local model, a server."""

    def score(self, rows: Sequence[Row]) -> list[ScoredRow]:
        """The numbers of each row, in order; they may not depend on which rows come together."""
        ...


def read_row(raw: Mapping[str, Any], index: int, vocab_size: int) -> Row:
    """Check one input row.

    Args:
        raw: with ``input_ids`` and ``labels``, equally long, unshifted; ``-100`` is not trained on.
        index: its number, for messages.
        vocab_size: ids must be below it.

    Raises:
        DataError: a column is missing, lengths differ, an id is outside the vocabulary, or a label is not the input at
            its place.
    """
    if missing := [name for name in ("input_ids", "labels") if name not in raw]:
        raise DataError(
            f"row {index} has no {' and no '.join(missing)}; expected tokenised rows with input_ids and labels"
        )
    ids, labels = np.asarray(raw["input_ids"], dtype=np.int64), np.asarray(raw["labels"], dtype=np.int64)
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise DataError(
            f"row {index} has input_ids of shape {ids.shape} and labels of shape {labels.shape}; expected two flat "
            "lists of one length (labels are not shifted)"
        )
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(
            f"row {index} has token ids from {ids.min()} to {ids.max()}, the model knows 0 to {vocab_size - 1}; "
            "tokenise with the model's own tokenizer"
        )
    mask = supervised_mask(raw["labels"])
    positions = np.flatnonzero(mask)
    if len(wrong := positions[labels[positions] != ids[positions]]):
        t = int(wrong[0])
        raise DataError(
            f"row {index}, position {t}: the label is {labels[t]}, the input {ids[t]}; a cached row needs labels "
            "equal to input_ids or -100, unshifted"
        )
    return Row(ids, positions, row_checksum(ids, mask))  # pyright: ignore[reportArgumentType]
