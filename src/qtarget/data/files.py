"""What a file holds, one value a row with its place: JSON lines, arrays, tables, Parquet and Arrow, plain or compressed."""

from __future__ import annotations

import csv
import difflib
import glob
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from qtarget.core.errors import DataError
from qtarget.data.limits import Limits
from qtarget.data.limits.unpacking import check_text, open_text

Row = dict[str, Any]
Files = str | Path | Sequence[str | Path]

COMPRESSED = (".gz", ".zst")
TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_KINDS = (".parquet", ".arrow")
READABLE = (*(kind + more for kind in TEXT_KINDS for more in ("", *COMPRESSED)), *TABLE_KINDS)
"""How the names of readable files end."""

NUMBERS = ("weight",)
"""Columns of a CSV or TSV whose cells are numbers; an empty cell is no value."""
LISTS = ("input_ids", "labels", "loss_weights")
"""Columns of a CSV or TSV whose cells are JSON lists."""
NUMBER = re.compile(r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""How JSON spells half of a pair; UTF-8 text holds none in another way."""
EXCERPT_CHARACTERS = 80
NEAR_STEM = 0.7
"""How like two files' stems are, from 0 to 1, for one to be proposed for the other."""
MOST_NAMES = 10_000
"""Names below a folder that are looked at for a pattern."""


class Place(NamedTuple):
    """Where a row stands."""

    path: Path
    where: str

    def __str__(self) -> str:
        return f"{self.path}, {self.where}"

    def seen_from(self, other: Place) -> str:
        """Without the file's name where both are in one file."""
        return self.where if self.path == other.path else str(self)


Located = tuple[Place, Any]


def expand(files: Files) -> list[Path]:
    """The files that a path, a list of paths, or patterns with ``*`` stand for; a pattern's are sorted.

    Raises:
        DataError: an empty list, a pattern that no file matches, or a file that is named twice.

    Example:
        >>> expand(["b.jsonl", "a.jsonl"])
        [PosixPath('b.jsonl'), PosixPath('a.jsonl')]
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    found: list[Path] = []
    for name in given:
        if Path(name).exists() or not glob.has_magic(str(name)):
            found.append(Path(name))
            continue
        matches = [Path(match) for match in sorted(glob.glob(str(name), recursive=True)) if Path(match).is_file()]
        if not matches:
            raise DataError(f"no file matches {name}; check the pattern and the folder that it starts from")
        found += matches
    if not found:
        raise DataError("the list of files is empty; name at least one file of rows")
    seen: set[Path] = set()
    for path in found:
        if path.resolve() in seen:
            raise DataError(f"{path} is named twice, so that its rows would count double; name it once")
        seen.add(path.resolve())
    return found


def check_file(path: Path, option: str | None = None) -> None:
    """Raise where a path is no readable file of rows.

    Args:
        option: what named it; default: the config's keys.

    Raises:
        DataError: a folder, an unknown suffix, or no such file.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name its files by a pattern, for instance '{pattern_of(path)}'")
    if not path.name.lower().endswith(READABLE):
        raise DataError(
            f"{path}: expected a name that ends in {', '.join(TEXT_KINDS)} (each also with .gz or .zst), "
            f"{' or '.join(TABLE_KINDS)}; convert the file or rename it"
        )
    if not path.is_file():
        near = _near(path)
        hint = f"did you mean {near}? Check" if near else "check"
        raise DataError(f"{path} is not a file; {hint} {option or 'train_file and validation_file'}")


def check_files(files: Files, option: str) -> None:
    """``check_file`` of all that a path or a pattern stands for.

    Raises:
        DataError: see ``expand`` and ``check_file``.
    """
    for path in expand(files):
        check_file(path, option)


def stem_of(name: str) -> str:
    """A file's name without what says its kind.

    Example:
        >>> stem_of("rows.train.jsonl.gz"), stem_of("notes")
        ('rows.train', 'notes')
    """
    ending = max((kind for kind in READABLE if name.lower().endswith(kind)), key=len, default="")
    return name[: len(name) - len(ending)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Files by the fewest last parts of their paths that tell them apart.

    Example:
        >>> distinct_names([Path("rows/a/train.jsonl"), Path("rows/b/train.jsonl")])
        ['a/train.jsonl', 'b/train.jsonl']
        >>> distinct_names([Path("rows/train.jsonl")])
        ['train.jsonl']
    """
    longest = max((len(path.parts) for path in paths), default=1)
    depth = next((n for n in range(1, longest) if len({path.parts[-n:] for path in paths}) == len(paths)), longest)
    return [str(Path(*path.parts[-depth:])) for path in paths]


def pattern_of(folder: Path) -> str:
    """A pattern for the files of rows in a folder, or below it; .json comes last, for it may hold what is about them."""
    below = glob.iglob("**/*", root_dir=folder, recursive=True)
    names = [name for name in itertools.islice(below, MOST_NAMES) if name.lower().endswith(READABLE)]

    def rank(name: str) -> tuple[bool, bool, int]:
        ending = name[len(stem_of(name)) :].lower()
        return ending.startswith(".json") and not ending.startswith(".jsonl"), os.sep in name, READABLE.index(ending)

    best = min((name for name in names if (folder / name).is_file()), key=rank, default="rows.jsonl")
    return str(folder / ("**" if os.sep in best else "") / f"*{best[len(stem_of(best)) :]}")


def _near(path: Path) -> Path | None:
    """The file of rows beside it whose stem is most like; that all end in .jsonl says nothing."""
    beside = {stem_of(name): name for name in sorted(_siblings(path)) if name.lower().endswith(READABLE)}
    near = difflib.get_close_matches(stem_of(path.name), list(beside), n=1, cutoff=NEAR_STEM)
    return path.with_name(beside[near[0]]) if near else None


def located_values(path: Path, limits: Limits | None = None) -> Iterator[Located]:
    """Each row of a text file as it stands there.

    Args:
        limits: on the file's size; rows are the caller's to count.

    Raises:
        DataError: another encoding than UTF-8, what does not parse, or a file beyond the limits.
    """
    kind = _kind_of_file(path.name.lower())
    try:
        check_text(path, limits or Limits())
        if kind in (".csv", ".tsv"):
            yield from _table(path, "".join(text for _, text in _lines(path)), "," if kind == ".csv" else "\t")
        elif kind == ".json":
            yield from _json_array(path, "".join(text for _, text in _lines(path)))
        else:
            yield from _json_lines(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); if its name ends in .gz or .zst, it must be a complete gzip or zstd file"
        ) from error


def _kind_of_file(name: str) -> str:
    stem = name.removesuffix(".gz").removesuffix(".zst")
    return next(kind for kind in TEXT_KINDS if stem.endswith(kind))


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends, decoded one by one."""
    with open_text(path) as stream:
        offset = 0
        _refuse_wide_encoding(path, stream)
        for number, raw in enumerate(stream, start=1):
            try:
                yield number, raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: byte {offset + error.start} is not UTF-8 ({error.reason}); save it as "
                    f"UTF-8, for instance with {_conversion(path, 'latin1')} if it is Latin-1"
                ) from error
            offset += len(raw)


def _refuse_wide_encoding(path: Path, stream: BinaryIO) -> None:
    """UTF-16 and UTF-32 by their mark, or by the zero bytes between Latin letters."""
    head: bytes = stream.peek(64)[:64]  # pyright: ignore[reportAttributeAccessIssue]
    name = None
    if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        name = "UTF-32"
    elif head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        name = "UTF-16"
    elif head.count(0) > len(head) // 2:
        name = "UTF-32LE" if head[:1] != b"\0" else "UTF-32BE"
    elif head.count(0) >= max(1, len(head) // 4):
        name = "UTF-16LE" if head[:1] != b"\0" else "UTF-16BE"
    if name is not None:
        raise DataError(f"{path} is {name}, expected UTF-8; convert it: {_conversion(path, name)}")


def _conversion(path: Path, encoding: str) -> str:
    """The command that makes a UTF-8 file of it."""
    tool = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(path.suffix.lower())
    if tool is None:
        return f"`iconv -f {encoding} -t UTF-8 {path} > {path.with_stem(path.stem + '_utf8')}`"
    plain = path.with_suffix("")
    return f"`{tool} {path} | iconv -f {encoding} -t UTF-8 > {plain.with_stem(plain.stem + '_utf8')}`"


def is_json_lines(path: Path) -> bool:
    """Whether a file holds a JSON value a line, by its name."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson"))


def json_lines(path: Path) -> Iterator[tuple[Place, str]]:
    """The lines of a file that hold something, as text."""
    for number, text in _lines(path):
        # JSON strings hold no bare carriage return, so one within a line is an old line end
        yield from ((Place(path, f"line {number}"), line) for line in text.split("\r") if line.strip())


def _json_lines(path: Path) -> Iterator[Located]:
    for place, line in json_lines(path):
        try:
            value = json.loads(line, object_pairs_hook=_each_key_once)
        except json.JSONDecodeError as error:
            is_array = line.strip() == "[" or (line.strip()[:2] == "[{" and place.where == "line 1")
            hint = "the file is a JSON array, name it .json" if is_array else "expected one JSON object a line"
            raise DataError(
                f"{place}, column {error.colno}: not valid JSON ({error.msg}): {excerpt(line)}; {hint}"
            ) from error
        except (RecursionError, ValueError) as error:
            raise DataError(f"{place}: JSON that cannot be read ({error}); remove the row") from error
        if SURROGATE.search(line):
            _check_unicode(place, value)
        yield place, value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; Python's own reader keeps the last of two values of one key, and loses the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _json_array(path: Path, text: str) -> Iterator[Located]:
    if not text.strip():
        return
    try:
        values = json.loads(text, object_pairs_hook=_each_key_once)
    except json.JSONDecodeError as error:
        lines = text.splitlines()
        line = lines[error.lineno - 1] if error.lineno <= len(lines) else ""
        hint = (
            "it looks like JSON Lines: name it .jsonl" if error.msg == "Extra data" else "expected an array of objects"
        )
        raise DataError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}): {excerpt(line)}; {hint}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: JSON that cannot be read ({error})") from error
    if not isinstance(values, list):
        keys = f" with keys {', '.join(list(values)[:5])}" if isinstance(values, dict) else ""
        raise DataError(
            f"{path}: the top level is {kind_of(values)}{keys}, expected an array of objects; put the rows into one "
            "array, or one object a line in a .jsonl file"
        )
    suspect = SURROGATE.search(text) is not None
    for number, value in enumerate(values, start=1):
        place = Place(path, f"row {number}")
        if suspect:
            _check_unicode(place, value)
        yield place, value


def _check_unicode(place: Place, row: Any) -> None:
    """Refuse lone surrogates: JSON can spell them, UTF-8, Arrow and tokenizers cannot hold them."""
    for name, value in row.items() if isinstance(row, dict) else ():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            near = error.object[max(0, error.start - 20) : error.end + 20]
            raise DataError(
                f"{place}: column {name!a} holds half of a surrogate pair, near {excerpt(ascii(near))}, which is "
                "no character: text was cut within an emoji or the like; remove it, or export the text again"
            ) from error


def _table(path: Path, text: str, delimiter: str) -> Iterator[Located]:
    limit = csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))  # the default refuses long documents
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    word = "CSV" if delimiter == "," else "TSV"
    separator = "commas" if delimiter == "," else "tabs"
    try:
        _check_header(path, reader.fieldnames or [], delimiter)
        for row in reader:
            place = Place(path, f"line {reader.line_num}")
            if None in row:
                raise DataError(
                    f"{place}: {len(row[None])} more values than the {len(reader.fieldnames or [])} columns of the "
                    f"header; quote fields that contain {separator}"
                )
            yield place, _cells(place, row)
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: not valid {word} ({error}); quote fields that contain {separator}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def _check_header(path: Path, names: Sequence[str], delimiter: str) -> None:
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: two columns are called {twice!r}; give each column a name of its own")
    other = next((c for c in (";", "\t", ",") if c != delimiter and len(names) == 1 and c in names[0]), None)
    if other is not None:
        wanted = "name it .tsv" if other == "\t" else "name it .csv" if other == "," else "export it with commas"
        raise DataError(f"{path}, line 1: one column {names[0]!r}; the separator seems to be {other!r}: {wanted}")


def _cells(place: Place, row: Row) -> Row:
    """A row of text cells with its numbers and lists as such."""
    for name in (*NUMBERS, *LISTS):
        cell = row.get(name)
        if not isinstance(cell, str):
            continue
        if not cell.strip():
            row[name] = None
        elif name in NUMBERS:
            if NUMBER.fullmatch(cell) is None or not math.isfinite(float(cell)):
                raise DataError(f"{place}: column {name!r} holds {excerpt(cell)!r}; expected a number such as 0.5")
            row[name] = float(cell)
        elif cell.lstrip().startswith("["):
            try:
                row[name] = json.loads(cell)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place}: column {name!r} holds {excerpt(cell)!r}; expected a list: {error}"
                ) from error
    return row


def excerpt(text: str) -> str:
    """The beginning of a text, short enough for a message."""
    text = text.strip()
    return text if len(text) <= EXCERPT_CHARACTERS else text[:EXCERPT_CHARACTERS] + "..."


def kind_of(value: Any) -> str:
    """The kind of a value in words.

    Example:
        >>> kind_of({}), kind_of(None), kind_of(2)
        ('an object', 'null', 'an integer')
    """
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
        int: "an integer",
        float: "a number",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def names_of(columns: Iterable[str]) -> str:
    """Column names in words.

    Example:
        >>> names_of(["prompt", "completion"])
        '`prompt` and `completion`'
    """
    return " and ".join(f"`{name}`" for name in columns)
