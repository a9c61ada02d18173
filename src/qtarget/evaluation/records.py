"""What an evaluation has found out so far, a line a row: it goes on where a kill stopped it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError, StorageError
from qtarget.report.runs.records import read_lines
from qtarget.storage.differences import differences

Key = tuple[str, str, str, int]
"""Part (``nll`` or ``completion``), set (``data`` or ``forgetting``), contender, row."""


WEIGHTS = "weights"
"""In a plan: what decides which tokens and answers count, where rows have weights."""


class Records:
    """A JSONL beside the output: the plan first, then a line a row of a part.

    Args:
        path: of the file.
        plan: what the numbers depend on; JSON.
        resume: whether to go on with what is there.

    Raises:
        ConfigError: there is an earlier evaluation, and ``resume`` is not set or its plan is another.
        StorageError: the file cannot be written.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        self._path, self._lines = path, {}
        refuse_earlier(path, resume)
        known = read_lines(path)
        if known:
            check_plan(path, known[0].get("plan") or {}, plan)
        _drop_cut_line(path)
        self._heading = [] if known else [{"plan": plan}]
        for line in known[1:]:
            self._lines[_key(line)] = line

    def get(self, key: Key) -> dict[str, Any] | None:
        """The line of a row, if it is known."""
        return self._lines.get(key)

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append the lines that are not known yet.

        Raises:
            StorageError: the disk is full, or the folder cannot be written to.
        """
        new = {_key(line): line for line in lines if _key(line) not in self._lines}
        if not new:
            return
        self._write([*self._heading, *new.values()])  # an evaluation that fails before its first row leaves no file
        self._heading = []
        self._lines |= new

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n" for line in lines)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}; free space, then go on with --resume") from error


def refuse_earlier(path: Path, resume: bool) -> None:
    """Raise before anything is loaded where records of an earlier evaluation would be mixed with new ones.

    Raises:
        ConfigError: there are some, and ``resume`` is not set.
    """
    if not resume and path.is_file() and path.stat().st_size:
        raise ConfigError(
            f"{path} holds an earlier evaluation; --resume goes on with it (and judges the same completions anew), "
            "--overwrite begins anew, or choose another --output"
        )


def _key(line: Mapping[str, Any]) -> Key:
    return line["part"], line["set"], line["contender"], line["row"]


def check_plan(path: Path, known: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse to mix two evaluations.

    Raises:
        ConfigError: names what differs.
    """
    if WEIGHTS in plan and WEIGHTS not in known:
        raise ConfigError(
            f"{path}: its rows have weights, and it was begun by a version of qtarget that counted tokens and answers of weight 0 "
            "too; they do not count any more, so old and new numbers cannot stand side by side; begin anew with another --output"
        )
    if differing := differences(known, plan):
        raise ConfigError(
            f"{path} is of another evaluation: {'; '.join(differing)}; give what it was begun with, or choose another "
            "--output"
        )


def _drop_cut_line(path: Path) -> None:
    """Remove what a kill left of a last line, so that the next one starts on its own."""
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
