"""Rows as flat columns: tokens, what is trained on, and a frozen model's numbers at each trained token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from qtarget.core.errors import DataError
from qtarget.core.types import WITNESS_FIELDS, Reference, TailPolicy, WeightsScale
from qtarget.data.agreement import confident_choices, counted_fields
from qtarget.data.crossfit.witness import witness_fields
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import Row, ScoredRow, Source, read_row
from qtarget.scoring.cache.schema import row_checksum, supervised_mask


@dataclass(frozen=True)
class TokenRows:
    """Tokenised rows, flat; tokens of row i are ``offsets[i] : offsets[i + 1]``.

    Attributes:
        numbers: ``[rows]`` the row's number in the user's data.
        offsets: ``[rows + 1]``.
        ids: ``[tokens]`` token ids.
        supervised: ``[tokens]`` whether training predicts the token (``supervised_mask``).
        loss_weights: ``[trained]`` the data's own factor on each trained token, where it has any.
        weights_scale: what of a token they multiply.
    """

    numbers: np.ndarray
    offsets: np.ndarray
    ids: np.ndarray
    supervised: np.ndarray
    loss_weights: np.ndarray | None = None
    weights_scale: WeightsScale = "all"

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def labels(self) -> np.ndarray:
        """``[trained]`` ids of the trained tokens."""
        return self.ids[self.supervised]

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[rows]`` tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def trained_offsets(self) -> np.ndarray:
        """``[rows + 1]`` the same as ``offsets``, counting trained tokens alone."""
        return np.concatenate([[0], np.cumsum(self.supervised)])[self.offsets]

    @cached_property
    def row_of_trained(self) -> np.ndarray:
        """``[trained]`` index of the row of each trained token."""
        return np.repeat(np.arange(len(self)), np.diff(self.trained_offsets))

    @cached_property
    def place_of_trained(self) -> np.ndarray:
        """``[trained]`` how many trained tokens of its row come before."""
        starts = self.trained_offsets
        return np.arange(starts[-1]) - starts[self.row_of_trained]

    def take(self, rows: np.ndarray) -> TokenRows:
        """The same for some rows, in the order given."""
        tokens = spans(self.offsets, rows)
        weights = None if self.loss_weights is None else self.loss_weights[spans(self.trained_offsets, rows)]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])])
        return TokenRows(
            self.numbers[rows], offsets, self.ids[tokens], self.supervised[tokens], weights, self.weights_scale
        )


def spans(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of all elements of some rows.

    Example:
        >>> spans(np.array([0, 2, 5]), np.array([1, 0])).tolist()
        [2, 3, 4, 0, 1]
    """
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate([np.arange(int(offsets[i]), int(offsets[i + 1])) for i in rows])


def flatten_rows(rows: Sequence[Mapping[str, Any]], name: str = "qtarget_row") -> TokenRows:
    """Rows with ``input_ids`` and ``labels`` (unshifted, -100 is not trained on), and their number under ``name``.

    Raises:
        DataError: there are no rows.
    """
    if not rows:
        raise DataError("there are no rows to look at; check the file and the split")
    masks = [np.asarray(supervised_mask(row["labels"]), dtype=bool) for row in rows]
    weighted = rows[0].get("loss_weights") is not None
    weights = [np.asarray(row["loss_weights"], dtype=np.float32)[m] for row, m in zip(rows, masks)] if weighted else []
    return TokenRows(
        np.array([row.get(name, i) for i, row in enumerate(rows)], dtype=np.int64),
        np.concatenate([[0], np.cumsum([len(m) for m in masks])]).astype(np.int64),
        np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]),
        np.concatenate(masks),
        np.concatenate(weights) if weighted else None,
    )


@dataclass(frozen=True)
class ModelNumbers:
    """What a model said at each trained token; fields and units as in ``qtarget.Reference``, flat, float32.

    Attributes:
        name: the model, for people.
        vocab_size: its head's rows.
        tail_policy: what a loss lets stand for the unlisted tokens.
        crossfit: ``[trained]`` label log-probs of copies of this model that have not seen the row, if somebody trained them.
        counted: ``[trained]`` each of ``qtarget.core.types.DATA_FIELDS`` that a target needs, see ``with_counted``.
    """

    name: str
    vocab_size: int
    label_log_probs: np.ndarray
    entropy: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_log_probs: np.ndarray | None = None
    tail_log_mass: np.ndarray | None = None
    tail_policy: TailPolicy = "bucket"
    crossfit: np.ndarray | None = None
    counted: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def top_k(self) -> int:
        """Log-probs listed at each token."""
        return 0 if self.topk_ids is None else self.topk_ids.shape[1]

    def ranks(self, labels: np.ndarray) -> np.ndarray | None:
        """``[trained]`` rank of each observed token, from 1; 0 beyond the list, None without one."""
        if self.topk_ids is None:
            return None
        equal = self.topk_ids == labels[:, None]
        return np.where(equal.any(1), equal.argmax(1) + 1, 0)

    def reference(self, part: slice) -> Reference:
        """Some tokens as torch tensors, log-probs float32."""

        def tensor(value: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor | None:
            return None if value is None else torch.from_numpy(np.ascontiguousarray(value[part])).to(dtype)

        return Reference(
            tensor(self.label_log_probs, torch.float32),
            tensor(self.entropy, torch.float32),
            tensor(self.topk_ids, torch.long),
            tensor(self.topk_log_probs, torch.float32),
            tensor(self.tail_log_mass, torch.float32),
            tail_policy=self.tail_policy,
            **{name: tensor(values, torch.float32) for name, values in self.counted.items()},
        )

    def with_counted(self, rows: TokenRows, fields: frozenset[str]) -> ModelNumbers:
        """The same with what a target needs to know of the rows around each token, counted among these rows."""
        ids = np.split(rows.ids, rows.offsets[1:-1])
        masks = np.split(rows.supervised, rows.offsets[1:-1])
        known, said = np.split(self.label_log_probs, rows.trained_offsets[1:-1]), None
        if self.topk_ids is not None and self.topk_log_probs is not None:
            said = np.split(confident_choices(self.topk_ids, self.topk_log_probs), rows.trained_offsets[1:-1])
        found = counted_fields(ids, masks, known, fields, said)  # pyright: ignore[reportArgumentType]
        counted = {name: np.concatenate(values) for name, values in found.items()}
        if self.crossfit is not None and fields & set(WITNESS_FIELDS):
            counted |= witness_fields(self.label_log_probs, self.crossfit, rows.row_of_trained)[0]
        return replace(self, counted=counted)


def short_name(model: str) -> str:
    """A model as pages name it: a folder by its last part, a hub name whole.

    Example:
        >>> short_name("/data/models/tiny"), short_name("owner/name")
        ('tiny', 'owner/name')
    """
    return PurePath(model).name if PurePath(model).is_absolute() else model


FIELDS = ("label_log_probs", "entropy", "topk_ids", "topk_log_probs", "tail_log_mass")


def numbers_from_cache(cache: ReferenceCache, rows: TokenRows) -> ModelNumbers:
    """Look up every row that trains on something; training drops the others, so no cache holds them.

    Raises:
        CacheMismatchError: a row was never scored.
        DataError: no row trains on anything.
    """
    trained = np.flatnonzero(np.diff(rows.trained_offsets))
    if not len(trained):
        raise DataError("no row trains on anything; `qtarget audit-data` says why")
    bounds = list(zip(rows.offsets[trained], rows.offsets[trained + 1], strict=True))
    checksums = [row_checksum(rows.ids[a:b], rows.supervised[a:b]) for a, b in bounds]  # pyright: ignore[reportArgumentType]
    return numbers_at(cache, cache.locate(checksums, rows.numbers[trained]))


def numbers_at(cache: ReferenceCache, indices: Iterable[int]) -> ModelNumbers:
    """The numbers of some rows of a cache, one at least, one after the other."""
    found = [cache.row(int(index)) for index in indices]
    joined: dict[str, Any] = {f: np.concatenate([row[f] for row in found]) for f in FIELDS if f in found[0]}
    manifest = cache.manifest
    return ModelNumbers(short_name(manifest.model_id), manifest.vocab_size, **joined, tail_policy=manifest.tail_policy)


def numbers_from_source(source: Source, rows: TokenRows, name: str, top_k: int) -> ModelNumbers:
    """Run a model over the rows, keeping ``top_k`` alternatives a token.

    Raises:
        DataError: a token id outside the model's vocabulary.
    """
    checked: list[Row] = []
    for i, (a, b) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        labels = np.where(rows.supervised[a:b], rows.ids[a:b], -100)
        checked.append(read_row({"input_ids": rows.ids[a:b], "labels": labels}, i, source.vocab_size))
    scored: list[ScoredRow] = source.score(
        [row.input_ids for row in checked], top_k, positions=[row.positions for row in checked]
    )
    present = [field for field in FIELDS if getattr(scored[0], field) is not None]
    joined: dict[str, Any] = {f: np.concatenate([getattr(row, f) for row in scored]) for f in present}
    return ModelNumbers(short_name(name), source.vocab_size, **joined)
