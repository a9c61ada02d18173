"""The files of a run that a report reads, and that training writes: JSON lines and one description.

``qtarget_run.json`` says what the run is. ``qtarget_log.jsonl`` holds every logged line as transformers logged it, also of
a run that is still going or was killed. ``qtarget_samples.jsonl`` holds the tokens of a few rows at each evaluation;
``qtarget_rollouts.jsonl`` a few samples of each log line, where a run trains on samples of its own. What a
later run in the same folder would replace is moved to ``earlier_records/1``, ``2``, ...
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtarget.core.errors import DataError
from qtarget.storage.files import append_text, write_text

RUN_FILE, LOG_FILE, SAMPLES_FILE = "qtarget_run.json", "qtarget_log.jsonl", "qtarget_samples.jsonl"
ROLLOUTS_FILE = "qtarget_rollouts.jsonl"
RECORDS = (RUN_FILE, LOG_FILE, SAMPLES_FILE, ROLLOUTS_FILE)
CONFIG_FILE = "qtarget_config.yaml"
"""The whole configuration, as `qtarget train` leaves it."""
EARLIER = "earlier_records"
SCHEMA_VERSION = 1


def is_run(folder: Path) -> bool:
    """Whether a run of ours, finished or not, left its records in a folder."""
    return any((folder / name).is_file() for name in (CONFIG_FILE, RUN_FILE))


def write_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """A new file of JSON lines."""
    write_text(path, "".join(json.dumps(value, default=_plain) + "\n" for value in values))


def set_aside(folder: Path) -> Path | None:
    """Move a run's records to ``earlier_records/N`` below its folder, N the next number; None where there are none."""
    files = [path for name in RECORDS if (path := folder / name).is_file()]
    if not files:
        return None
    taken = [int(path.name) for path in (folder / EARLIER).glob("*") if path.name.isdigit()]
    place = folder / EARLIER / str(max(taken, default=0) + 1)
    place.mkdir(parents=True)
    for path in files:
        path.rename(place / path.name)
    return place


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """One line more; a kill can cut off this line alone."""
    # opened for each line: nothing waits in a buffer when the process is killed
    append_text(path, json.dumps(value, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    """A number that a metric logged as a NumPy or torch scalar; anything else as text."""
    return value.item() if getattr(value, "ndim", None) == 0 else str(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file; a last line that a kill cut off is left out.

    Raises:
        DataError: another line is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    values: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line end: still being written, or cut off
                break
            raise DataError(f"{path}, line {number}: not JSON ({error}); delete that line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object, found {line[:60]}; delete that line")
        values.append(value)
    return values
