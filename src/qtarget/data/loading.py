"""Rows from a user's file, or an error that names the file, the line and the next step."""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Located = tuple[str, Any]  # ("line 3", value)

READABLE = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
# In TRL's order: a row that has several of them is read as the first.
FORMATS = (("input_ids", "labels"), ("input_ids",), ("prompt", "completion"), ("messages",))
# Names other projects use, too far from ours in spelling for difflib.
OTHER_NAMES = {
    "instruction": "prompt",
    "question": "prompt",
    "query": "prompt",
    "input": "prompt",
    "answer": "completion",
    "output": "completion",
    "response": "completion",
    "chosen": "completion",
    "conversations": "messages",
    "conversation": "messages",
    "chat": "messages",
    "content": "text",
    "tokens": "input_ids",
}
# Columns that TRL or qtarget reads; all others are the user's notes.
TRAINING_COLUMNS = {
    *("input_ids", "labels", "prompt", "completion", "messages", "text", "weight", "loss_weights"),
    *("completion_mask", "assistant_masks", "tools", "chat_template_kwargs"),
}
EXCERPT_CHARACTERS = 80


def load_rows(path: str | Path, *, text_field: str = "text") -> list[Row]:
    """The rows of a file in one of four shapes, checked one by one.

    The shapes are TRL's: ``messages``; ``prompt`` and ``completion``; a text column; or ``input_ids`` (with ``labels``
    if they differ). All rows of a file have the same one.

    Args:
        path: ``.jsonl``, ``.json`` (an array of objects), either with ``.gz``, ``.csv`` or ``.parquet``.
        text_field: name of the text column (TRL's ``dataset_text_field``).

    Returns:
        One dict a row, in the file's order; other columns are kept.

    Raises:
        DataError: no such file, an unknown suffix, an empty file, a line that does not parse, a row that is no object
            or lacks its columns, values of the wrong type, or rows of different shapes.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"prompt": "2+2=", "completion": "4"}')
        >>> load_rows(path)
        [{'prompt': '2+2=', 'completion': '4'}]
    """
    path = Path(path)
    rows: list[Row] = []
    shape: tuple[str, ...] = ()
    first = ""
    for where, value in _located_values(path):
        row = _object(path, where, value)
        found = _shape(path, where, row, text_field)
        _check_values(path, where, row, found)
        _check_unicode(path, where, row)
        if rows and found != shape:
            raise DataError(
                f"{path}, {where}: this row has {_names(found)}, but {first} has {_names(shape)}; one file holds rows "
                "of one shape, so split it into two files or rename the columns"
            )
        if not rows:
            shape, first = found, where
        rows.append(row)
    if not rows:
        raise DataError(
            f"{path} holds no rows; expected one training example a line (or array element). Check the export."
        )
    return rows


def load_dataset_file(path: str | Path, *, text_field: str = "text") -> Dataset:
    """The same rows as a ``datasets.Dataset``; columns absent in a row are ``None`` there.

    Columns that training does not read and that mix types (``noise_spans``) become JSON text, since Arrow
    has one type a column.

    Raises:
        DataError: as ``load_rows``, and a column that training reads whose type changes between rows.
    """
    import pyarrow as pa
    from datasets import Dataset

    rows = load_rows(path, text_field=text_field)
    columns = list(dict.fromkeys(name for row in rows for name in row))  # from_list would keep those of row 1 alone
    table = {name: [row.get(name) for row in rows] for name in columns}
    for name, values in table.items():
        try:
            pa.array(values)
        except pa.ArrowException as error:
            if name in TRAINING_COLUMNS | {text_field}:
                raise _mixed_column(path, name, values, error) from error
            table[name] = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return Dataset.from_dict(table)


def _mixed_column(path: str | Path, name: str, values: list[Any], error: Exception) -> DataError:
    index = _first_of_other_type(values)
    return DataError(
        f"{path}, row {index + 1}: column {name!r} holds {_excerpt(json.dumps(values[index], default=str))}, of "
        f"another type than the rows above ({error}); give the column one type, or remove it"
    )


def _first_of_other_type(values: list[Any]) -> int:
    import pyarrow as pa

    low, high = 0, len(values)  # invariant: values[:low] converts, values[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except pa.ArrowException:
            high = middle
    return high - 1


def _located_values(path: Path) -> Iterator[Located]:
    name = path.name.lower()
    if not name.endswith(READABLE):
        raise DataError(f"{path}: expected a name that ends in {', '.join(READABLE)}; convert the file or rename it")
    if not path.is_file():
        near = difflib.get_close_matches(path.name, _siblings(path), n=1)
        hint = f"did you mean {path.with_name(near[0])}? " if near else ""
        raise DataError(f"{path} is not a file; {hint}Check train_file and validation_file.")
    if name.endswith(".parquet"):
        yield from _parquet(path)
        return
    text = _text(path)
    if name.endswith(".csv"):
        yield from _csv(path, text)
    elif name.removesuffix(".gz").endswith(".jsonl"):
        yield from _json_lines(path, text)
    else:
        yield from _json_array(path, text)


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.name.lower().endswith(".gz") and raw else raw
        # a byte-order mark, which spreadsheets write, would become part of the first column's name
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); if its name ends in .gz, it must be a complete gzip file"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save it as UTF-8, for instance with "
            "`iconv -f latin1 -t utf-8`"
        ) from error


def _json_lines(path: Path, text: str) -> Iterator[Located]:
    # not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            hint = (
                "the file is a JSON array, name it .json" if line.strip() == "[" else "expected one JSON object a line"
            )
            raise DataError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}): {_excerpt(line)}; {hint}"
            ) from error


def _json_array(path: Path, text: str) -> Iterator[Located]:
    if not text.strip():
        return
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1] if error.lineno <= len(lines) else ""
        hint = (
            "it looks like JSON Lines: name it .jsonl" if error.msg == "Extra data" else "expected an array of objects"
        )
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}): {_excerpt(line)}; {hint}"
        ) from error
    if not isinstance(values, list):
        keys = f" with keys {', '.join(list(values)[:5])}" if isinstance(values, dict) else ""
        raise DataError(
            f"{path}: the top level is {_kind(values)}{keys}, expected an array of objects; put the rows into one "
            "array, or "
            "one object a line in a .jsonl file"
        )
    yield from ((f"row {number}", value) for number, value in enumerate(values, start=1))


def _csv(path: Path, text: str) -> Iterator[Located]:
    limit = csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))  # the default refuses long documents
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{path}, {where}: {len(row[None])} more values than the {len(reader.fieldnames or [])} columns "
                    "of the "
                    "header; quote fields that contain commas"
                )
            yield where, row
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not valid CSV ({error}); quote fields that contain commas"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); write it again") from error
    yield from ((f"row {number}", value) for number, value in enumerate(table.to_pylist(), start=1))


def _object(path: Path, where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            f'{path}, {where}: expected an object such as {{"prompt": ..., "completion": ...}}, found {_kind(value)}: '
            f"{_excerpt(json.dumps(value, ensure_ascii=False))}"
        )
    return value


def _shape(path: Path, where: str, row: Row, text_field: str) -> tuple[str, ...]:
    shapes = (*FORMATS, (text_field,))
    for shape in shapes:
        if all(row.get(name) is not None for name in shape):
            if "prompt" in row and shape in (("messages",), (text_field,)):
                raise DataError(
                    f"{path}, {where}: {_names(shape)} stands beside `prompt` without `completion`, and TRL would "
                    "read the "
                    "row as prompt and completion; remove the column `prompt`"
                )
            return shape
    wanted = "; ".join(_names(shape) for shape in shapes)
    raise DataError(
        f"{path}, {where}: no usable columns; found {', '.join(row) or 'none'}, expected one of: {wanted}."
        f"{_column_hint(row, [name for shape in shapes for name in shape])}"
    )


def _column_hint(row: Row, known: list[str]) -> str:
    empty = [name for name in known if name in row and row[name] is None]
    hints = [f"{name!r} is there but holds no value" for name in empty]
    for name in row:
        if name in known:
            continue
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
        meant = OTHER_NAMES.get(name.lower()) or (near[0] if near else None)
        if meant in known and row.get(meant) is None:
            hints.append(f"rename {name!r} to {meant!r}")
    if not hints:
        present = [name for name in ("prompt", "completion") if name in row]
        hints = [f"{name!r} needs its other half" for name in present]
    return f" Next: {'; '.join(hints)}." if hints else ""


def _check_values(path: Path, where: str, row: Row, shape: tuple[str, ...]) -> None:
    for name in shape:
        value = row[name]
        if name == "messages":
            good, expected = _is_messages(value), 'a list of {"role": ..., "content": ...}'
        elif name in ("input_ids", "labels"):
            good, expected = _is_ids(value), "a list of token ids (integers)"
        elif name in ("prompt", "completion"):
            good, expected = (
                isinstance(value, str) or _is_messages(value),
                "text, or a list of messages with role and content",
            )
        else:
            good, expected = isinstance(value, str), "text"
        if not good:
            csv_hint = "; CSV holds text only, use .jsonl" if path.suffix == ".csv" else ""
            raise DataError(
                f"{path}, {where}: column {name!r} is {_kind(value)} {_excerpt(json.dumps(value, default=str))}; "
                "expected "
                f"{expected}{csv_hint}"
            )
    if shape == ("input_ids", "labels") and len(row["input_ids"]) != len(row["labels"]):
        raise DataError(
            f"{path}, {where}: {len(row['labels'])} labels for {len(row['input_ids'])} input_ids; give one label a token, "
            "-100 where it is not trained on"
        )
    if shape == ("prompt", "completion") and isinstance(row["prompt"], str) != isinstance(row["completion"], str):
        raise DataError(
            f"{path}, {where}: prompt is {_kind(row['prompt'])} and completion {_kind(row['completion'])}; make both "
            "text, or "
            "both lists of messages"
        )


def _check_unicode(path: Path, where: str, row: Row) -> None:
    """Refuse lone surrogates: JSON can spell them, UTF-8, Arrow and tokenizers cannot hold them."""
    for name, value in row.items():
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 20) : error.end + 20]
            raise DataError(
                f"{path}, {where}: column {name!r} holds half of a surrogate pair, near {_excerpt(ascii(near))}, which is "
                "no character: text was cut within an emoji or the like; remove it, or export the text again"
            ) from error


def _is_messages(value: Any) -> bool:
    messages = isinstance(value, list) and len(value) > 0
    return messages and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _names(shape: tuple[str, ...]) -> str:
    return " and ".join(f"`{name}`" for name in shape)


def _excerpt(text: str) -> str:
    text = text.strip()
    return text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "..."
