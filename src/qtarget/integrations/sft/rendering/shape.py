"""The shape of the user's rows, chosen once, and nothing else of them in what TRL sees.

TRL asks a row for the columns of each shape in turn, a conversation by an arbitrary one of its columns, so a column beside
the row's own shape can decide its tokens (TRL 1.16: a note ``text`` takes the end token of ``completion``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, Json, Value
from pyarrow import compute

from qtarget.core.errors import DataError, counted, inflected
from qtarget.data import fields
from qtarget.data.checks.findings import Finding, named
from qtarget.data.loading import read_given
from qtarget.integrations.sft.data.columns import ROW, ROW_IDS, with_row_ids

Shape = tuple[str, ...]
_COMPUTE: Any = compute  # its functions are made at import


def is_prepared(dataset: Any) -> bool:
    """Whether rows went through ``Preparation`` before; a user's own columns of these names hold no list a row."""
    return isinstance(dataset, Dataset) and all(
        name in dataset.column_names and _is_list(dataset.features[name]) for name in ("input_ids", "labels", ROW_IDS)
    )


def adopt(dataset: Any, name: str, *, text_field: str) -> tuple[Any, list[Finding]]:
    """Numbered rows with the columns of one shape, and what was left out.

    Args:
        dataset: a ``Dataset``; rows that were prepared before, or that cannot be counted, come back as they are.
        name: of the data set, for messages.
        text_field: the text column (``dataset_text_field``).

    Raises:
        DataError: no shape that every row has, or a column that contradicts it; names columns and rows.
    """
    if isinstance(dataset, IterableDataset):
        return read_given(dataset, text_field, name), []
    if not isinstance(dataset, Dataset) or is_prepared(dataset) or dataset.format["type"] == "custom":
        return dataset, []
    dataset = dataset.with_format(None)
    if not len(dataset):
        raise DataError(f"the {name} data has no rows; check the path and the split")
    columns = dataset.column_names
    dataset = read_given(dataset, text_field, name)  # other people's shapes; rows from a file were read before
    shape = chosen_shape(dataset, name, text_field)
    _check_images(dataset, name)
    conversational = _check_types(dataset, name, shape)
    if shape != ("input_ids",) and "labels" in dataset.column_names:
        raise DataError(
            f"the {name} data has a column 'labels' ({_kind(dataset.features['labels'])}) beside {_words(shape)}; training "
            "makes the labels from the tokens, so it would not be read: rename it (a classifier's label is a note), or "
            "remove it"
        )
    found = _announced(dataset, columns, shape, conversational, text_field)
    known = (*shape, *fields.beside(shape, conversational))
    if shape == ("input_ids",):
        known = (*known, *fields.PACKED_ELSEWHERE)
    rows = with_row_ids(dataset.select_columns([column for column in dataset.column_names if column in known]))
    if shape == ("conversations",) and "role" in _keys(dataset.features["conversations"]):
        rows = rows.rename_column("conversations", "messages")  # TRL reads from/value under this name alone
    return rows, found


def chosen_shape(dataset: Dataset, name: str, text_field: str) -> Shape:
    """The first of ``fields.shapes`` that every row has.

    Raises:
        DataError: no row, or only some rows, have one.
    """
    lacking: dict[Shape, np.ndarray] = {}
    for shape in fields.shapes(text_field):
        if all(column in dataset.column_names for column in shape):
            nulls = _null_rows(dataset, shape)
            if not len(nulls):
                return shape
            lacking[shape] = nulls
    if lacking:
        shape, rows = min(lacking.items(), key=lambda item: len(item[1]))
        raise DataError(
            f"{len(rows)} of {counted(len(dataset), 'row')} of the {name} data have no value in {_words(shape)}: "
            f"{named(rows.tolist())}; all rows of a data set have one shape: fill them in, remove them, or split the data"
        )
    wanted = "; ".join(_words(shape) for shape in fields.shapes(text_field))
    raise DataError(
        f"the {name} data has no usable columns; found {', '.join(dataset.column_names)}, expected one of: {wanted}; "
        "rename them, or set dataset_text_field"
    )


def batches(dataset: Dataset, columns: Sequence[str], size: int = 1000) -> Iterator[tuple[int, pa.Table]]:
    """Number of the first row, and an Arrow table, of each so many rows."""
    start = 0
    tables: Any = dataset.select_columns(list(columns)).with_format("arrow").iter(size)
    for table in tables:
        yield start, table
        start += len(table)


def _rows_where(dataset: Dataset, columns: Sequence[str], test: Callable[[pa.ChunkedArray], Any]) -> np.ndarray:
    """Numbers of the rows where the test holds for any of the columns."""
    found: list[np.ndarray] = []
    for start, table in batches(dataset, columns):
        hit = np.zeros(len(table), dtype=bool)
        for column in columns:
            hit |= np.asarray(test(table[column]), dtype=bool)
        found.append(np.flatnonzero(hit) + start)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _null_rows(dataset: Dataset, shape: Shape) -> np.ndarray:
    return _rows_where(dataset, shape, lambda column: _COMPUTE.is_null(column).combine_chunks())


def _check_images(dataset: Dataset, name: str) -> None:
    """Refuse images; columns of them that hold none are notes."""
    for column in fields.IMAGES:
        if column not in dataset.column_names:
            continue
        filled = [i for i, value in enumerate(dataset.with_format("arrow")[:][column].to_pylist()) if value]
        if filled:
            raise DataError(
                f"{counted(len(filled), 'row')} of the {name} data {inflected(len(filled), 'hold')} something in "
                f"the column {column!r}: {named(filled)}; only text is trained on here: remove "
                "these rows, or the column if the text stands alone"
            )


def _check_types(dataset: Dataset, name: str, shape: Shape) -> bool:
    """Whether the shape holds messages.

    Raises:
        DataError: a column of another type than its shape has, or conversations without a message.
    """
    kinds = {column: dataset.features[column] for column in shape}
    if shape == ("input_ids",):
        if not _is_list(kinds["input_ids"]):
            raise _wrong_type(name, "input_ids", kinds["input_ids"], "a list of token ids a row")
        return False
    texts = [column for column, kind in kinds.items() if _is_text(kind)]
    talks = [column for column, kind in kinds.items() if _is_messages(kind)]
    if len(texts) == len(shape) and shape not in (("messages",), ("conversations",)):
        return False
    if len(talks) == len(shape) and shape in (("messages",), ("conversations",), ("prompt", "completion")):
        _check_keys(name, {column: _keys(kind) for column, kind in kinds.items()})
        empty = _rows_where(dataset, shape, _has_no_entries)
        if len(empty):
            raise DataError(
                f"{len(empty)} of {counted(len(dataset), 'row')} of the {name} data have no message, or a null for one, "
                f"in {_words(shape)}: {named(empty.tolist())}; remove them, or give all messages in a column `messages`"
            )
        return True
    if shape in (("messages",), ("conversations",)):
        raise _wrong_type(name, shape[0], kinds[shape[0]], 'a list of {"role": ..., "content": ...} a row')
    if len(shape) == 1:
        raise _wrong_type(name, shape[0], kinds[shape[0]], "text")
    wrong = next((column for column in shape if column not in (*texts, *talks)), "completion")
    raise _wrong_type(name, wrong, kinds[wrong], "text in both prompt and completion, or messages in both")


def _check_keys(name: str, keys: dict[str, list[str]]) -> None:
    """Refuse messages without a role or a content; keys are unknown where each message has its own."""
    for column, found in keys.items():
        pair = ("from", "value") if column == "conversations" and "role" not in found else ("role", "content")
        if found and not set(pair) <= set(found):
            raise DataError(
                f"the messages in {column!r} of the {name} data have the keys {', '.join(found)}; expected {' and '.join(pair)}; "
                "rename them (from and value are read in a column `conversations`)"
            )


def _has_no_entries(column: pa.ChunkedArray) -> np.ndarray:
    """Lists that are empty, or hold a null."""
    column = column.combine_chunks()
    found = column.value_lengths().to_numpy(zero_copy_only=False) == 0
    entries = column.flatten()
    if entries.null_count:
        parents = _COMPUTE.list_parent_indices(column).to_numpy()
        found[parents[_COMPUTE.is_null(entries).to_numpy(zero_copy_only=False)]] = True
    return found


def _wrong_type(name: str, column: str, kind: Any, expected: str) -> DataError:
    return DataError(
        f"the column {column!r} of the {name} data holds {_kind(kind)}; expected {expected}; "
        "convert it, or rename it if it is a note"
    )


def _announced(
    dataset: Dataset, columns: Sequence[str], shape: Shape, conversational: bool, text_field: str
) -> list[Finding]:
    """What the rows are read as where that could surprise, and the columns that are left out.

    Args:
        columns: of the rows as the user gave them.
    """
    read = (*shape, *fields.beside(shape, conversational), *fields.NOTES_READ, ROW)
    unused = [
        column
        for column in columns
        if column not in read and column not in fields.PACKED_ELSEWHERE * (shape == ("input_ids",))
    ]
    complete = [other for other in fields.shapes(text_field) if set(other) <= set(columns) and other != shape]
    rival = next((other for other in complete if shape != ("input_ids",)), None)  # tokens keep their text as a note
    found = []
    if unused:
        message = f"rows are read as {_words(shape)}; not read: {', '.join(unused)}"
        message += f"; remove {_words(shape)} to train on {_words(rival)} instead" if rival else ""
        severity: Any = "warning" if rival else "info"
        found.append(
            Finding("columns_unused", severity, len(dataset), (), message, {"read": list(shape), "unused": unused})
        )
    near = fields.misspelt(columns, shape, conversational)
    for column in shape if conversational and shape != ("conversations",) else ():
        keys = fields.misspelt_keys(_message_keys(dataset, column))
        near |= {f"{column}[...].{key}": meant for key, meant in keys.items()}
    for column, meant in near.items():
        message = f"{column!r} is not read; did you mean {meant!r}? Rename it, or give a note another name"
        found.append(
            Finding("misspelt_column", "warning", len(dataset), (), message, {"column": column, "meant": meant})
        )
    return found


def _is_list(kind: Any) -> bool:
    return isinstance(getattr(kind, "feature", None), Value) and kind.feature.dtype not in ("string", "large_string")


def _is_text(kind: Any) -> bool:
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def _is_messages(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind[0] if isinstance(kind, list) and kind else None)
    return isinstance(inner, dict | Json)


def _keys(kind: Any) -> list[str]:
    inner = getattr(kind, "feature", kind[0] if isinstance(kind, list) and kind else None)
    return list(inner) if isinstance(inner, dict) else []


def _message_keys(dataset: Dataset, column: str) -> list[str]:
    """Keys of any message; of messages that keep their own keys, by looking at each."""
    keys = _keys(dataset.features[column])
    if keys:
        return keys
    rows: Any = dataset.select_columns([column])
    return sorted({key for row in rows for message in row[column] for key in message})


def _kind(kind: Any) -> str:
    if isinstance(kind, Value):
        return {"string": "text", "large_string": "text", "bool": "true or false"}.get(
            kind.dtype, f"numbers ({kind.dtype})"
        )
    return (
        "messages"
        if _is_messages(kind)
        else "lists"
        if hasattr(kind, "feature")
        else f"values of type {type(kind).__name__}"
    )


def _words(shape: Sequence[str]) -> str:
    return " and ".join(f"`{column}`" for column in shape)
