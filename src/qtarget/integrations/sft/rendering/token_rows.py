"""Rows that the user tokenised: their masks are honoured, or refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from qtarget.core.errors import DataError, counted, inflected
from qtarget.data import fields
from qtarget.data.checks.audit import IGNORE_INDEX
from qtarget.data.checks.findings import named
from qtarget.integrations.sft.data.ragged import Ragged

MASKS = ("completion_mask", "assistant_masks", "attention_mask")


def given_tokens(
    dataset: Dataset, name: str, *, pad_token_id: int | None = None, completion_only: bool | None = None
) -> Dataset:
    """Rows of ``input_ids`` and ``labels`` alone (and weights), every mask and the padding worked in.

    Without labels, ``completion_mask`` and ``assistant_masks`` make them; tokens that ``attention_mask`` hides are left out.

    Args:
        dataset: has ``input_ids``.
        name: of the data set, for messages.
        pad_token_id: of a tokenizer that uses this id for padding alone; None if it has another use too.
        completion_only: ``completion_only_loss``; only False, said by the user, leaves ``completion_mask`` unread.

    Raises:
        DataError: columns of other lengths or types, a mask that contradicts the labels, holes in ``attention_mask``,
            padding that would be trained on, or rows that are packed already.
    """
    ids, given = _token_columns(dataset, name)
    _refuse_packed(dataset, name, ids)
    labels = _labels(ids, given, name, completion_only)
    keep = _attended(ids, given, name)
    if keep is None and pad_token_id is not None:
        _refuse_padding(ids, labels, pad_token_id, name)
    if (
        keep is None
        and not (set(MASKS) | set(fields.PACKED_ELSEWHERE)) & set(dataset.column_names)
        and "labels" in given
    ):
        return dataset
    replaced = {"input_ids": ids.arrow(ids.values, keep), "labels": ids.arrow(labels, keep)}
    if "loss_weights" in given:
        replaced["loss_weights"] = ids.arrow(given["loss_weights"].values, keep)
    gone = [c for c in (*replaced, *MASKS, *fields.PACKED_ELSEWHERE) if c in dataset.column_names]
    rest: Any = dataset.remove_columns(gone)
    for column, values in replaced.items():
        rest = rest.add_column(column, values)
    return rest


def _token_columns(dataset: Dataset, name: str) -> tuple[Ragged, dict[str, Ragged]]:
    """``input_ids``, and the other columns with one entry a token."""
    given = {}
    for column in ("input_ids", *fields.TOKENS, "loss_weights"):
        if column not in dataset.column_names:
            continue
        kind: Any = dataset.features[column]
        dtype = getattr(getattr(kind, "feature", None), "dtype", "")
        numbers = ("int", "uint", "bool") if column != "loss_weights" else ("int", "uint", "float", "double")
        if not dtype.startswith(numbers):
            what = "token ids, whole numbers" if column == "input_ids" else "one number a token"
            note = "; a classifier's label is a note: rename it" if column == "labels" else ""
            raise DataError(
                f"the column {column!r} of the {name} data holds {dtype or getattr(kind, 'dtype', kind)}; expected a list of "
                f"{what}, beside input_ids{note}"
            )
        given[column] = Ragged.of(dataset, column)
    ids = given.pop("input_ids")
    for column, values in given.items():
        wrong = np.flatnonzero(values.lengths != ids.lengths)
        if len(wrong):
            row = int(wrong[0])
            length = int(values.lengths[row])
            raise DataError(
                f"{subject(wrong, name, 'have')} another number of {column} than of input_ids: "
                f"{named(wrong.tolist())} (row {row + 1}: {max(length, 0)} and {ids.lengths[row]}); give one a token"
            )
    for column, values in {"input_ids": ids, **given}.items():
        if values.values.dtype == object or (values.values.dtype.kind == "f" and column != "loss_weights"):
            raise DataError(f"the column {column!r} of the {name} data holds null among its numbers; give one a token")
    return ids, given


def subject(rows: np.ndarray, name: str, verb: str) -> str:
    """Which rows do something: the beginning of a sentence.

    Example:
        >>> subject(np.array([4]), "train", "have")
        '1 row of the train data has'
    """
    return f"{counted(len(rows), 'row')} of the {name} data {inflected(len(rows), verb)}"


def _refuse_packed(dataset: Dataset, name: str, ids: Ragged) -> None:
    step = "give whole rows, one document each; packing: true packs them and keeps them apart"
    if "seq_lengths" in dataset.column_names and hasattr(dataset.features["seq_lengths"], "feature"):
        rows = np.flatnonzero(Ragged.of(dataset, "seq_lengths").lengths > 1)
        if len(rows):
            raise DataError(f"{subject(rows, name, 'are')} packed (seq_lengths): {named(rows.tolist())}; {step}")
    if "position_ids" in dataset.column_names and hasattr(dataset.features["position_ids"], "feature"):
        places = Ragged.of(dataset, "position_ids")
        usual = np.arange(len(ids.values)) - np.repeat(ids.starts, ids.lengths)
        same = np.array_equal(places.lengths, ids.lengths)
        rows = np.unique(ids.rows[places.values != usual]) if same else np.flatnonzero(places.lengths != ids.lengths)
        if len(rows):
            raise DataError(
                f"{subject(rows, name, 'have')} position_ids other than 0, 1, 2, ...: {named(rows.tolist())}; "
                f"training numbers positions itself, so remove the column; if they are packed, {step}"
            )


def _labels(ids: Ragged, given: dict[str, Ragged], name: str, completion_only: bool | None) -> np.ndarray:
    """Labels as given, or of the masks; a mask is 0 where nothing is trained."""
    used = [m for m in ("completion_mask", "assistant_masks") if m in given]
    for mask in [m for m in MASKS if m in given]:
        values = given[mask].values
        wrong = np.unique(ids.rows[(values != 0) & (values != 1)])
        if len(wrong):
            raise DataError(
                f"{subject(wrong, name, 'have')} a {mask} of other values than 0 and 1: {named(wrong.tolist())}"
            )
    if completion_only is False:
        used = [m for m in used if m != "completion_mask"]
    if "labels" not in given:
        trained = np.ones(len(ids.values), dtype=bool)
        for mask in used:
            trained &= given[mask].values == 1
        return np.where(trained, ids.values, IGNORE_INDEX).astype(np.int64)
    labels = given["labels"].values
    for mask in used:
        rows = np.unique(ids.rows[(labels != IGNORE_INDEX) & (given[mask].values == 0)])
        if len(rows):
            raise DataError(
                f"{subject(rows, name, 'have')} labels where {mask} is 0: {named(rows.tolist())}; labels and mask "
                "contradict each other, so remove the column that is wrong"
            )
    return labels


def _attended(ids: Ragged, given: dict[str, Ragged], name: str) -> np.ndarray | None:
    """Which tokens stay; None if all do."""
    if "attention_mask" not in given or (given["attention_mask"].values == 1).all():
        return None
    keep = given["attention_mask"].values == 1
    places = np.flatnonzero(keep)
    rows = ids.rows
    holes = np.unique(rows[places[1:]][(np.diff(places) > 1) & (np.diff(rows[places]) == 0)])
    if len(holes):
        raise DataError(
            f"{subject(holes, name, 'hide')} tokens between others (attention_mask): {named(holes.tolist())}; "
            "expected 0 for padding at one end alone; a token that is not to be trained gets the label -100"
        )
    return keep


def _refuse_padding(ids: Ragged, labels: np.ndarray, pad: int, name: str) -> None:
    filled = np.flatnonzero(ids.lengths)
    starts, ends = ids.starts[filled], (ids.starts + ids.lengths)[filled] - 1
    left = ids.values[starts] == pad
    right = (ids.values[ends] == pad) & (labels[ends] != IGNORE_INDEX)
    rows = filled[left | right]
    if len(rows):
        raise DataError(
            f"{subject(rows, name, 'are')} padded (token {pad} at their start, or trained on at their end) without "
            f"an attention_mask: {named(rows.tolist())}; give rows without padding, or the attention_mask"
        )
