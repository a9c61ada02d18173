"""One row on its way in (token ids and mask) and out (a frozen model's numbers), and who turns one into the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qtarget.core.errors import DataError, HyperparameterError
from qtarget.scoring.cache.schema import row_checksum, supervised_mask

IntArray = NDArray[np.integer[Any]]
"""Flat integers of any width; lists will do at run time."""


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
class Samples:
    """Draws from a frozen model's distribution at the tokens of one row, with replacement; distinct ids are counted.

    Attributes:
        sizes: ``[tokens]`` uint8, distinct ids a token.
        ids: ``[distinct]`` int32, ascending within a token, each as the step from the one before it.
        counts: ``[distinct]`` uint8, how often each was drawn.
    """

    sizes: np.ndarray
    ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class ScoredRow:
    """A frozen model's numbers at the wanted positions of one row, float32, nats.

    Attributes:
        label_log_probs: ``[tokens]``, of the token that stands there.
        entropy: ``[tokens]``, over the whole vocabulary; absent where an engine does not tell it.
        topk_ids: ``[tokens, k]`` int32, or absent.
        topk_log_probs: ``[tokens, k]``, descending, or absent.
        tail_log_mass: ``[tokens]``, log-probability of all other ids, or absent.
        candidate_log_probs: ``[tokens, candidates]``, of the ids that were asked for, or absent.
        samples: draws from the whole distribution, or absent.
    """

    label_log_probs: np.ndarray
    entropy: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_log_probs: np.ndarray | None = None
    tail_log_mass: np.ndarray | None = None
    candidate_log_probs: np.ndarray | None = None
    samples: Samples | None = None


class Source(Protocol):
    """Whatever can score rows of token ids: a local model, a cluster, a server."""

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, padding rows included."""
        ...

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """The model's numbers on each row, in the order given; they may not depend on which rows come together.

        Args:
            token_ids: ``[time]`` of each row, unpadded; rows may differ in length.
            top_k: the largest log-probs to list a position, with the mass of all others; 0 for none.
            candidate_ids: token ids whose log-probs are wanted at every position.
            positions: of each row, where numbers are wanted, ascending; the numbers at position ``t`` are about token
                ``t`` given those before it, so each is at least 1. Default: all of ``1 .. len - 1``.

        Raises:
            DataError, HyperparameterError: see ``check_request``.
        """
        ...


@runtime_checkable
class SamplingSource(Protocol):
    """A source that sees the whole distribution and can draw from it."""

    def sample(
        self, token_ids: Sequence[IntArray], uniforms: Sequence[np.ndarray], *, positions: Sequence[IntArray]
    ) -> list[ScoredRow]:
        """Label log-probs, entropy and draws at the given positions of each row.

        Args:
            token_ids, positions: as in ``Source.score``.
            uniforms: of each row ``[positions, draws]`` float64 in [0, 1): each is looked up in the distribution's
                cumulative sum, so the same numbers give the same draws.
        """
        ...


def check_request(
    token_ids: Sequence[IntArray],
    top_k: int,
    candidate_ids: Sequence[int] | None,
    positions: Sequence[IntArray] | None,
    vocab_size: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Check the arguments of ``Source.score``: every engine begins with it, so all refuse alike.

    Returns:
        Token ids and positions of each row, int64, the default positions spelled out.

    Raises:
        DataError: ids or positions that are not flat, an id outside the vocabulary, a position that is not one of
            ``1 .. len - 1``, positions that do not ascend, or not one list of positions a row.
        HyperparameterError: ``top_k`` is not within 0 and the vocabulary, or a candidate is outside it.
    """
    if not 0 <= top_k <= vocab_size:
        raise HyperparameterError(f"top_k={top_k}; expected 0 to {vocab_size}, the model's vocabulary")
    if candidate_ids is not None and not all(0 <= c < vocab_size for c in candidate_ids):
        raise HyperparameterError(f"candidate_ids {list(candidate_ids)[:5]}; expected ids of 0 to {vocab_size - 1}")
    if positions is not None and len(positions) != len(token_ids):
        raise DataError(f"{len(token_ids)} rows and {len(positions)} lists of positions; expected one a row")
    rows = [np.asarray(ids, dtype=np.int64) for ids in token_ids]
    if positions is None:
        places = [np.arange(1, max(1, len(ids))) for ids in rows]
    else:
        places = [np.asarray(at, dtype=np.int64) for at in positions]
    for index, (ids, at) in enumerate(zip(rows, places, strict=True)):
        if ids.ndim != 1 or at.ndim != 1:
            raise DataError(
                f"row {index + 1} has ids of shape {ids.shape}, positions of {at.shape}; expected flat lists"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            raise DataError(
                f"row {index + 1} has token ids from {ids.min()} to {ids.max()}, the model knows 0 to {vocab_size - 1}; "
                "tokenise with the model's own tokenizer"
            )
        if len(at) and (at[0] < 1 or at[-1] >= len(ids) or (np.diff(at) < 1).any()):
            raise DataError(
                f"row {index + 1} has positions {at.tolist()[:5]} ...; expected ascending ones of 1 to {len(ids) - 1}: "
                "nothing predicts position 0"
            )
    return rows, places


def empty_row(top_k: int, candidate_ids: Sequence[int] | None, *, entropy: bool) -> ScoredRow:
    """The answer for a row without positions."""
    none = np.zeros(0, np.float32)
    wide = np.zeros((0, top_k), np.float32)
    return ScoredRow(
        none,
        none if entropy else None,
        wide.astype(np.int32) if top_k else None,
        wide if top_k else None,
        none if top_k else None,
        None if candidate_ids is None else np.zeros((0, len(candidate_ids)), np.float32),
    )


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
            f"row {index + 1} has no {' and no '.join(missing)}; expected tokenised rows with input_ids and labels"
        )
    ids, labels = np.asarray(raw["input_ids"], dtype=np.int64), np.asarray(raw["labels"], dtype=np.int64)
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise DataError(
            f"row {index + 1} has input_ids of shape {ids.shape} and labels of shape {labels.shape}; expected two flat "
            "lists of one length (labels are not shifted)"
        )
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(
            f"row {index + 1} has token ids from {ids.min()} to {ids.max()}, the model knows 0 to {vocab_size - 1}; "
            "tokenise with the model's own tokenizer"
        )
    mask = supervised_mask(raw["labels"])
    positions = np.flatnonzero(mask)
    if len(wrong := positions[labels[positions] != ids[positions]]):
        t = int(wrong[0])
        raise DataError(
            f"row {index + 1}, position {t}: the label is {labels[t]}, the input {ids[t]}; a cached row needs labels "
            "equal to input_ids or -100, unshifted"
        )
    return Row(ids, positions, row_checksum(ids, mask))  # pyright: ignore[reportArgumentType]
