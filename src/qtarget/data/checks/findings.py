"""What an audit says: one finding a defect, for terminals, for JSON and for the report page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
ROWS_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One defect, or one measured fact, of a data set. A check that finds nothing makes no finding.

    ``as_dict()`` is the JSON that ``qtarget audit-data --json`` writes and that a report page shows::

        {"check": "truncated", "severity": "warning", "count": 3, "rows": [4, 9, 17],
         "message": "3 of 100 rows are truncated before their end (max_length 512), ...: rows 4, 9, 17; raise ...",
         "evidence": {"lost_tokens": 120, "max_length": 512}}

    Attributes:
        check: its name, one of ``docs/audit.md``'s table; stable, for filters.
        severity: ``error``: training would fail, or would not do what the configuration says; ``warning``: training
            runs and learns something that is probably not meant; ``info``: a fact, no defect.
        count: rows concerned (all rows for statistics).
        rows: the first few of them (at most ``ROWS_NAMED``), by their number in the data, from 0.
        message: what was found, what was expected, the next step; plain text that may quote the data, so a page escapes it.
        evidence: JSON values. ``examples``, where present, is a list of mappings with at least ``row``; checks of tokens
            give ``position`` (in ``input_ids``), ``text``, ``log_prob`` (nats), ``rank`` (1 is the base's favourite; null
            beyond the cached top-k), and ``base_text`` with ``base_probability``: what the base would have said.
    """

    check: str
    severity: Severity
    count: int
    rows: tuple[int, ...]
    message: str
    evidence: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Only lists, mappings, text, numbers and null."""
        return {**asdict(self), "rows": list(self.rows), "evidence": dict(self.evidence)}


def named(rows: Sequence[int], count: int | None = None) -> str:
    """The first few rows in words, counted from 1 as lines are; ``count`` is of all where ``rows`` are the first few alone.

    Example:
        >>> named([3]), named([0, 1, 2, 3, 4, 5])
        ('row 4', 'rows 1, 2, 3, 4, 5, ...')
    """
    total = len(rows) if count is None else count
    more = ", ..." if total > min(len(rows), ROWS_NAMED) else ""
    return f"row{'s' if total > 1 else ''} {', '.join(str(row + 1) for row in rows[:ROWS_NAMED])}{more}"


def finding(
    check: str, severity: Severity, rows: Sequence[int], of: int, what: str, step: str, **evidence: Any
) -> list[Finding]:
    """``[Finding]`` with the usual message, or ``[]`` where no row is concerned.

    Args:
        rows: all rows concerned, ascending.
        of: rows looked at.
        what: the predicate of "3 of 100 rows ...".
        step: what to do.

    Example:
        >>> finding("empty_answer", "warning", [2], 9, "have an empty answer", "remove them")[0].message
        '1 of 9 rows have an empty answer: row 3; remove them'
    """
    if not len(rows):
        return []
    first = tuple(int(row) for row in rows[:ROWS_NAMED])
    message = f"{len(rows)} of {of} rows {what}: {named(first, len(rows))}; {step}"
    return [Finding(check, severity, len(rows), first, message, evidence)]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Errors, then warnings, then facts; the order within is kept."""
    return sorted(findings, key=lambda found: SEVERITIES.index(found.severity))
