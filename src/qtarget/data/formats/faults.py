"""All faulty rows of a file at once: what is wrong with the first of each kind, and where the others stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qtarget.core.errors import DataError
from qtarget.data.files import Place

NAMED = 5
"""Rows that are named of a kind, and kinds that are told."""
VARIES = re.compile(r"\d+|'[^']*'|`[^`]*`|\"[^\"]*\"")
"""What two messages of one kind may differ in, beside their place."""


@dataclass
class Kind:
    """Faults of one sort.

    Attributes:
        error: of the first.
        others: the first places after it.
        count: of all.
    """

    error: DataError
    others: list[Place] = field(default_factory=list)
    count: int = 1


class Faults:
    """Collects what is wrong with rows, and raises it as one error when all are read.

    Example:
        >>> from pathlib import Path
        >>> faults, rows = Faults(), [Place(Path("a.jsonl"), f"line {i}") for i in (6, 8, 9)]
        >>> for place in rows:
        ...     with faults.kept(place):
        ...         raise DataError(f"{place}: column 'output' is an integer")
        >>> faults.refuse()
        Traceback (most recent call last):
        qtarget.core.errors.DataError: a.jsonl, line 6: column 'output' is an integer (3 rows: also line 8, line 9)
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {}
        self.first: Place | None = None
        self.end: DataError | None = None

    @contextmanager
    def kept(self, place: Place) -> Iterator[None]:
        """Keep the error of a row."""
        try:
            yield
        except DataError as error:
            self.first = self.first or place
            sort = VARIES.sub("", str(error).removeprefix(str(place)))
            if sort not in self.kinds:
                self.kinds[sort] = Kind(error)
                return
            kind = self.kinds[sort]
            kind.count += 1
            if len(kind.others) < NAMED - 1:
                kind.others.append(place)

    def passed(self, rows: Iterable[tuple[Place, dict]]) -> Iterator[tuple[Place, dict]]:
        """The rows, up to one that cannot be parsed; its error is the last."""
        try:
            yield from rows
        except DataError as error:
            if not self.kinds:
                raise
            self.end = error

    def refuse(self) -> None:
        """Raise where there is a fault.

        Raises:
            DataError: the first of each kind.
        """
        if not self.kinds:
            return
        kinds = list(self.kinds.values())
        if len(kinds) == kinds[0].count == 1 and self.end is None:
            raise kinds[0].error
        told = [self._told(kind) for kind in kinds[:NAMED]] + ([str(self.end)] if self.end else [])
        if len(kinds) > NAMED:
            told.append(f"and faults of {len(kinds) - NAMED:,} more kinds")
        raise DataError("\n".join(told)) from kinds[0].error

    def _told(self, kind: Kind) -> str:
        if kind.count == 1:
            return str(kind.error)
        assert self.first is not None
        where = ", ".join(place.seen_from(self.first) for place in kind.others)
        more = f" and {kind.count - 1 - len(kind.others):,} more" if kind.count - 1 > len(kind.others) else ""
        return f"{kind.error} ({kind.count:,} rows: also {where}{more})"
