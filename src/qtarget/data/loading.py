"""Rows from a user's files or Dataset, or an error that names the file, the line and the next step."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError
from qtarget.data.files import (
    TABLE_KINDS,
    Files,
    Located,
    Place,
    Row,
    check_file,
    distinct_names,
    expand,
    is_json_lines,
    json_lines,
    located_values,
)
from qtarget.data.formats import CONVERSATIONS, Reading, RowReader, read_rows
from qtarget.data.formats.messages import ROLES
from qtarget.data.formats.preference import MARKS, rejected_lines
from qtarget.data.formats.shape import ReadOptions
from qtarget.data.formats.tools import read_tools
from qtarget.data.limits import Limits
from qtarget.data.limits.unpacking import read_table
from qtarget.data.nested import OBJECTS, as_written, is_struct, rows_to_dataset
from qtarget.storage.files import read_small

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "dataset_of",
    "load_dataset_file",
    "load_rows",
    "load_tools",
    "original_texts",
    "raw_rows",
    "read_dataset",
    "read_files",
    "read_given",
    "read_originals",
    "rows_to_dataset",
]

PLAIN_KEYS = ("role", "content", "from", "value")
ROLES_MARK = "qtarget roles: "
"""Begins the line, in the description of a data set, with the roles that its user named."""
TOLD_MARK = "qtarget told of rejected answers: "
"""Begins a line there with their number, of which the warning was given when the rows were read."""

logger = logging.getLogger(__name__)


def read_files(
    files: Files, options: ReadOptions | None = None, through: Callable[[Place, Any], Any] | None = None
) -> Reading:
    """The rows of one or several files, in any of the shapes of ``qtarget.data.formats``, made into TRL's.

    Args:
        files: a path, a list of paths, or patterns such as ``data/*.jsonl``; names end in ``.jsonl``, ``.json`` (an array of
            objects), ``.csv``, ``.tsv`` (each also with ``.gz`` or ``.zst``), ``.parquet`` or ``.arrow``.
        options: how rows are read.
        through: makes a value of each place and what stands there, before it is read.

    Returns:
        Rows in the files' order, and what was read, changed and left out.

    Raises:
        DataError: no such file, an unknown suffix, an empty file, another encoding than UTF-8, a line that does not parse, a
            row that is no object or lacks its columns, values of the wrong type, or rows of different shapes.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"conversations": [{"from": "gpt", "value": "Hi"}]}')
        >>> read_files(path).announced
        ['read 1 row as sharegpt: conversations -> messages', '1 row: role gpt -> assistant']
    """
    paths = expand(files)
    warnings: list[str] = []
    options = options or ReadOptions()
    reading = read_rows(_passed(_values(paths, warnings, options.limits), through), options)
    if not reading.rows:
        raise DataError(
            f"{', '.join(map(str, paths))} holds no rows{' that can be trained' if reading.announced else ''}; expected one "
            "training example a line (or array element). Check the export."
        )
    if len(paths) > 1:
        reading.announced.insert(0, f"read {len(paths)} files: {_starts(reading.places)}")
    reading.announced += warnings
    return reading


def read_originals(
    files: Files, options: ReadOptions | None = None, change: Callable[[Any], Any] | None = None
) -> tuple[Reading, list[Row]]:
    """``read_files``, and each row as it stands in its file; of an archive of sessions, the row that was made of it.

    Args:
        change: makes of each value the one that is read, and that is given back.
    """
    found: dict[Place, Row] = {}

    def keep(place: Place, value: Any) -> Any:
        found[place] = value if change is None else change(value)
        return found[place]

    reading = read_files(files, options, keep)
    return reading, [found.get(place, row) for place, row in zip(reading.places, reading.rows, strict=True)]


def load_rows(files: Files, *, text_field: str = "text", options: ReadOptions | None = None) -> list[Row]:
    """The rows of ``read_files``; what was changed on the way is logged.

    Args:
        files: as ``read_files``.
        text_field: name of the text column (TRL's ``dataset_text_field``).
        options: how rows are read.

    Returns:
        One dict a row, in the files' order; other columns are kept.

    Raises:
        DataError: as ``read_files``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"prompt": "2+2=", "completion": "4"}')
        >>> load_rows(path)
        [{'prompt': '2+2=', 'completion': '4'}]
    """
    reading = read_files(files, replace(options or ReadOptions(), text_field=text_field))
    announce(reading, _name(files))
    return reading.rows


def original_texts(files: Files, options: ReadOptions | None = None) -> list[str]:
    """The JSON text of each row of ``read_files`` as it came in: of JSON lines the line itself, of other kinds its object.

    Raises:
        DataError: as ``read_files``.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rows.jsonl"
        >>> _ = path.write_text('{"prompt":  "2+2=", "completion": "4"}')
        >>> original_texts(path)
        ['{"prompt":  "2+2=", "completion": "4"}']
    """
    paths, options = expand(files), options or ReadOptions()
    wanted: list[Any] = list(read_files(files, options).places)
    texts: list[str] = []
    for path in paths:
        lines = json_lines(path) if is_json_lines(path) else _values([path], [], options.limits)
        for place, value in lines:
            if len(texts) < len(wanted) and place == wanted[len(texts)]:  # rows that were left out have no place
                texts.append(value.strip() if is_json_lines(path) else _as_json(value))
    return texts


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def load_dataset_file(files: Files, options: ReadOptions | None = None) -> Dataset:
    """The same rows as a ``datasets.Dataset``; columns absent in a row are ``None`` there.

    Objects keep their own keys (``rows_to_dataset``). Columns that training does not read and that mix types
    (``noise_spans``) become JSON text, since Arrow has one type a column.

    Raises:
        DataError: as ``load_rows``, and a column that training reads whose type changes between rows.
    """
    reading = read_files(files, options)
    announce(reading, _name(files))
    return dataset_of(reading, options)


def dataset_of(reading: Reading, options: ReadOptions | None = None) -> Dataset:
    """Rows that were read, and announced, as a data set that a trainer takes without telling the same again.

    Args:
        options: as they were read.

    Raises:
        DataError: a column that training reads whose type changes between rows; by file and row.
    """
    try:
        return _described(rows_to_dataset(reading.rows), reading, options)
    except DataError as error:
        first = reading.places[0].path
        alone = all(place.path == first for place in reading.places)
        raise DataError(f"{f'{first}, ' if alone else f'{_starts(reading.places)}; '}{error}") from error


def raw_rows(files: Files, options: ReadOptions | None = None) -> Iterator[Located]:
    """The rows of files as they are written, each with its place, whatever their shape.

    Args:
        files: as ``read_files``.
        options: of which the limits count.

    Raises:
        DataError: no such file, an unknown suffix, another encoding than UTF-8, or a line that does not parse.
    """
    warnings: list[str] = []
    yield from _values(expand(files), warnings, (options or ReadOptions()).limits)
    for line in warnings:
        logger.warning(line)


def load_tools(path: str | Path) -> list[dict[str, Any]]:
    """Tool schemas of a JSON file, for rows that come without theirs.

    Raises:
        DataError: the file holds no list of schemas.
    """
    try:
        text = read_small(path).decode("utf-8-sig")
        tools = read_tools(text, set())
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise DataError(f"{path}: {error}; expected a JSON list of tool schemas") from error
    if not tools:
        raise DataError(f"{path} holds no tools; expected a JSON list of tool schemas")
    return tools


def announce(reading: Reading, source: str) -> None:
    """Log what was read: aloud where anything is not as it was."""
    level = logging.WARNING if reading.changed or len(reading.announced) > 1 else logging.INFO
    for line in reading.announced:
        logger.log(level, "%s: %s", source, line)


def _starts(places: Sequence[Place]) -> str:
    """The first few files with the row that each begins with, as messages count rows through all of them."""
    starts: dict[Path, int] = {}
    for row, place in enumerate(places, start=1):
        starts.setdefault(place.path, row)
    named = zip(distinct_names(list(starts)), starts.values(), strict=True)
    words = [f"{name} from row {row:,}" for name, row in itertools.islice(named, 5)]
    return f"{', '.join(words)}{', ...' * (len(starts) > 5)}"


def _name(files: Files) -> str:
    return ", ".join(map(str, [files] if isinstance(files, str | Path) else files))


def _passed(values: Iterator[Located], through: Callable[[Place, Any], Any] | None) -> Iterator[Located]:
    return values if through is None else ((place, through(place, value)) for place, value in values)


def _values(paths: Sequence[Path], warnings: list[str], limits: Limits) -> Iterator[Located]:
    rows = 0
    for path in paths:
        check_file(path)
        is_table = path.name.lower().endswith(TABLE_KINDS)
        for value in _columns(path, warnings, limits) if is_table else located_values(path, limits):
            rows += 1
            limits.check_rows(path, rows)
            yield value


def _columns(path: Path, warnings: list[str], limits: Limits) -> Iterator[Located]:
    """Rows of a Parquet or Arrow file, without the nulls that its structs forced."""
    import pyarrow as pa
    from datasets import Dataset

    kind = path.suffix.lower().lstrip(".").capitalize()
    try:
        table = read_table(path, limits)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable {kind} file ({error}); write it again") from error
    try:
        rows, found, _ = as_written(Dataset(table))  # pyright: ignore[reportArgumentType]
    except (
        pa.ArrowException,
        ValueError,
        TypeError,
        NotImplementedError,
    ) as error:  # types that datasets does not know
        logger.info("%s: read without datasets (%s)", path, error)
        rows, found = table.to_pylist(maps_as_pydicts="strict"), []
    warnings += [f"{path}: {line}" for line in found]
    yield from ((Place(path, f"row {number}"), row) for number, row in enumerate(rows, start=1))


def read_dataset(dataset: Any, options: ReadOptions | None = None, name: str = "train data") -> Any:
    """A Python user's ``Dataset`` as training takes it: other people's shapes read, nulls that Arrow added taken out.

    A stream (``IterableDataset``) is read as it comes.

    Where a null of Arrow's cannot be told from one that was written, a warning names the column; ``rows_to_dataset`` makes
    a data set without this doubt. What needs nothing comes back as it is, and so does what is no ``Dataset``, is tokenised,
    or has a transform of its own.

    Args:
        dataset: rows in any shape of ``qtarget.data.formats``.
        options: how rows are read.
        name: for messages.

    Raises:
        DataError: as ``read_files``.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_list([{"instruction": "Translate", "input": "cat", "output": "chat"}])
        >>> read_dataset(rows)[0]["completion"]
        [{'role': 'assistant', 'content': 'chat'}]
    """
    from datasets import Dataset, IterableDataset, concatenate_datasets

    options = options or ReadOptions()
    if isinstance(dataset, IterableDataset):
        return _streamed(dataset, options, name)
    if not isinstance(dataset, Dataset) or not len(dataset) or dataset.format["type"] == "custom":
        return dataset
    if "input_ids" in dataset.column_names or _is_plain(dataset, options):
        return dataset
    rows, warnings, removed = as_written(dataset.with_format(None))
    where = Path(name)
    reading = read_rows(((Place(where, f"row {i}"), row) for i, row in enumerate(rows, start=1)), options)
    reading.announced += warnings
    if sum(reading.rejected.values()) <= _told(dataset):
        known = rejected_lines(reading.rejected)
        reading.announced = [line for line in reading.announced if line not in known]
    announce(reading, name)
    if not reading.rows:
        raise DataError(f"{name}: no row is left; see the lines above")
    if not reading.changed and not removed and not _needs_object(dataset):
        return _described(dataset, reading, options)
    made = list(dict.fromkeys(column for row in reading.rows for column in row))
    converted = [c for c in made if c in OBJECTS or c not in dataset.column_names]
    notes = [c for c in dataset.column_names if c in made and c not in converted]
    objects = rows_to_dataset([{c: row[c] for c in converted if c in row} for row in reading.rows])
    if not notes or reading.shape == "openviking":
        return _described(objects, reading, options)
    kept = dataset.select_columns(notes)
    if len(reading.rows) < len(dataset):
        kept = kept.select([int(place.where.removeprefix("row ")) - 1 for place in reading.places])
    whole = concatenate_datasets([kept, objects], axis=1)
    return _described(whole.select_columns([c for c in made if c in [*notes, *converted]]), reading, options)


def _streamed(dataset: Any, options: ReadOptions, name: str) -> Any:
    """The same for rows that come one by one: they are read as they come, and what is changed is not counted."""
    where = Path(name)
    first = next(iter(dataset), None)
    if first is None or "input_ids" in first:
        return dataset
    reader = RowReader(options, (Place(where, "row 1"), first))
    features = dataset.features or {}
    structs = [column for column in OBJECTS if column in features and is_struct(features[column], beyond=PLAIN_KEYS)]
    logger.info("%s: a stream of rows, read as %s", name, reader.shape.name)
    if structs:
        logger.warning(
            "%s: column %s holds Arrow structs, so objects have all keys that any row has, null where the row lacks them; in "
            "a stream they cannot be told, so load the rows with qtarget.data.loading.load_dataset_file",
            name,
            ", ".join(structs),
        )

    def read(row: Row, index: int) -> Row:
        made = reader.row(Place(where, f"row {index + 1}"), row)
        if made is None:
            raise DataError(
                f"{name}, row {index + 1}: null_content: drop leaves no rows out of a stream; filter it before"
            )
        return made

    return dataset.map(read, with_indices=True, remove_columns=list(first))


def read_given(dataset: Any, text_field: str = "text", name: str = "train") -> Any:
    """``read_dataset`` of what a Python user gave a trainer, with the roles that its loader named."""
    return read_dataset(dataset, ReadOptions(text_field=text_field, roles=_roles(dataset)), f"{name} data")


def _described(dataset: Dataset, reading: Reading, options: ReadOptions | None) -> Dataset:
    """The data set with the roles that its user named, so that whoever reads it again takes them too, and what was told.

    What is given stays as it is: it may be the user's own, and its description may be published.
    """
    lines = [ROLES_MARK + json.dumps(sorted(set(options.roles.values())))] if options and options.roles else []
    lines += [f"{TOLD_MARK}{sum(reading.rejected.values())}"] if reading.rejected else []
    if not lines:
        return dataset
    own = [line for line in _description(dataset) if not line.startswith((ROLES_MARK, TOLD_MARK))]
    described = copy.deepcopy(dataset)  # Arrow's tables are shared
    described.info.description = "\n".join([*own, *lines])
    return described


def _description(dataset: Any) -> list[str]:
    text: str = getattr(getattr(dataset, "info", None), "description", None) or ""
    return text.splitlines()


def _told(dataset: Dataset) -> int:
    """How many rejected answers were told of; of data sets that were joined, all of theirs."""
    return sum(int(line.removeprefix(TOLD_MARK)) for line in _description(dataset) if line.startswith(TOLD_MARK))


def _roles(dataset: Any) -> dict[str, str]:
    line = next((line for line in _description(dataset) if line.startswith(ROLES_MARK)), None)
    return {} if line is None else {name: name for name in json.loads(line.removeprefix(ROLES_MARK))}


def _needs_object(dataset: Any) -> bool:
    """Whether ``chat_template_kwargs`` is null in a row, which TRL cannot unpack."""
    name = "chat_template_kwargs"
    return name in dataset.column_names and any(value is None for value in dataset[name])


def _is_plain(dataset: Any, options: ReadOptions) -> bool:
    """Whether nothing can be wrong with the rows, told from the columns without reading them one by one."""
    names, text = set(dataset.column_names), options.text_field
    if options.format != "auto" or options.tools:
        return False
    if names & {
        "labels",
        "tools",
        "functions",
        "system",
        "chat_template_kwargs",
        "documents",
        "images",
        "image",
        "videos",
    }:
        return False
    if any(_may_reject(dataset.data.column(name)) for name in names & {*MARKS}):
        return False
    trained = names & {*CONVERSATIONS, text}
    if trained in ({"prompt", "completion"}, {text}) and all(_is_text(dataset, name) for name in trained):
        return True
    return trained == {"messages"} and _is_plain_conversation(dataset, "messages", options)


def _may_reject(column: Any) -> bool:
    """Whether a column may mark answers as not wanted: truth values, or a text among them that says false."""
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time

    kind = str(column.type)
    return kind == "bool" or (
        kind in ("string", "large_string") and "false" in pc.unique(pc.utf8_lower(column)).to_pylist()
    )


def _is_text(dataset: Any, name: str) -> bool:
    column = dataset.data.column(name)
    return str(column.type) in ("string", "large_string") and column.null_count == 0


def _is_plain_conversation(dataset: Any, name: str, options: ReadOptions) -> bool:
    """Messages of role and content alone, all text, of roles that need no mapping."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at run time

    column = dataset.data.column(name)
    if not pa.types.is_list(column.type) or not pa.types.is_struct(column.type.value_type) or column.null_count:
        return False
    struct = column.type.value_type
    if {f.name for f in struct} != {"role", "content"} or any(not pa.types.is_string(f.type) for f in struct):
        return False
    if (pc.min(pc.list_value_length(column)).as_py() or 0) == 0:
        return False
    messages = pc.list_flatten(column)
    roles, texts = pc.struct_field(messages, "role"), pc.struct_field(messages, "content")
    known = {*ROLES} - {"developer"} - set(options.roles)
    return not texts.null_count and set(pc.unique(roles).to_pylist()) <= known
