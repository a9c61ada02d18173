"""What of the tokenised rows would train on nothing, found before step one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtarget.core.errors import DataError
from qtarget.data.checks.findings import Finding, Severity, finding

IGNORE_INDEX = -100
UNUSABLE = ("empty", "unsupervised", "cut_off")

# check -> (what it means, the next step); the order is that of the messages
FINDINGS = {
    "empty": ("have no tokens", "remove them, or check the template and the tokenizer"),
    "unsupervised": (
        "have no supervised token",
        "check empty completions, assistant_only_loss and the chat template's {% generation %} marks",
    ),
    "cut_off": ("have all their supervised tokens beyond max_length", "raise max_length or shorten the prompts"),
    "truncated": (
        "are truncated before their end",
        "raise max_length as far as the model allows, or split them, or the model never sees how they end",
    ),
}


@dataclass(frozen=True)
class AuditReport:
    """Counts over tokenised rows; each row has at most one finding.

    Attributes:
        rows: rows seen.
        tokens: tokens that remain after the cut at ``max_length``.
        supervised_tokens: labels that remain and are predicted from at least one token.
        lost_tokens: supervised tokens beyond ``max_length``.
        max_length: tokens kept of a row, or None for all.
        findings: those that occurred, by name (``FINDINGS``). ``empty``, ``unsupervised`` and ``cut_off`` rows train on
            nothing and are errors; ``truncated`` rows train on a part, a warning.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    lost_tokens: int
    max_length: int | None
    findings: Mapping[str, Finding] = field(default_factory=dict)

    @property
    def unusable_rows(self) -> int:
        """Rows that train on nothing."""
        return sum(self.findings[name].count for name in UNUSABLE if name in self.findings)

    def messages(self) -> list[str]:
        """One line a finding: how many rows, which, and what to do; empty if all is well."""
        return [found.message for found in self.findings.values()]

    def raise_if_unusable(self) -> None:
        """Refuse a data set none of whose rows trains on anything.

        Raises:
            DataError: no rows, or every row is unusable.
        """
        if self.rows == 0:
            raise DataError("the data set has no rows; check the file, the split, and filters that may drop everything")
        if self.unusable_rows == self.rows:
            raise DataError("no row of the data set trains on anything: " + ". ".join(self.messages()))


def audit_rows(rows: Iterable[Mapping[str, Any]], *, max_length: int | None, keep_end: bool = False) -> AuditReport:
    """Look through tokenised rows, before they are cut, for those that would train on nothing.

    A causal model predicts token ``t`` from the tokens before it, so a label on the first token is no supervision.

    Args:
        rows: each with ``input_ids`` ``[length]`` and ``labels`` ``[length]`` (not shifted, -100 is ignored); without
            ``labels`` every token is supervised.
        max_length: tokens that training keeps of a row; None keeps all.
        keep_end: whether it keeps the last ones instead of the first.

    Raises:
        DataError: a row has other numbers of labels and tokens, or no ``input_ids``.

    Example:
        >>> report = audit_rows([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], max_length=2)
        >>> report.supervised_tokens, report.lost_tokens
        (1, 1)
        >>> report.messages()[0][:50]
        '1 of 1 rows are truncated before their end (max_le'
    """
    counts = [_supervision(index, row, max_length, keep_end) for index, row in enumerate(rows)]
    length, kept, beyond = np.array(counts, dtype=np.int64).reshape(-1, 3).T
    return _report(length, kept, beyond, max_length)


def audit_columns(
    lengths: np.ndarray, labels: np.ndarray, *, max_length: int | None, keep_end: bool = False
) -> AuditReport:
    """The same of whole columns, without a Python object a row.

    Args:
        lengths: ``[rows]`` tokens of each.
        labels: ``[sum(lengths)]`` of all rows, one after another.
        max_length, keep_end: as in ``audit_rows``.

    Example:
        >>> audit_columns(np.array([3]), np.array([-100, 6, 7]), max_length=2).lost_tokens
        1
    """
    ends = np.cumsum(lengths)
    place = np.arange(len(labels)) - np.repeat(ends - lengths, lengths)
    trained = (labels != IGNORE_INDEX) & (place > 0)
    remain = lengths if max_length is None else np.minimum(lengths, max_length)
    first = np.repeat(lengths - remain if keep_end else np.zeros_like(lengths), lengths)
    inside = trained & (place > first) & (place < first + np.repeat(remain, lengths))
    total, kept = (
        np.diff(np.concatenate([[0], np.cumsum(mask)])[np.concatenate([[0], ends])]) for mask in (trained, inside)
    )
    return _report(remain, kept, total - kept, max_length)


def _report(length: np.ndarray, kept: np.ndarray, beyond: np.ndarray, max_length: int | None) -> AuditReport:
    """Findings of ``[rows]`` tokens that remain, supervised ones among them, and supervised ones cut off."""
    nothing = (length > 0) & (kept == 0)
    concerned = {
        "empty": length == 0,
        "unsupervised": nothing & (beyond == 0),
        "cut_off": nothing & (beyond > 0),
        "truncated": (kept > 0) & (beyond > 0),
    }
    total, lost = len(length), int(beyond.sum())
    found: dict[str, Finding] = {}
    for name, (meaning, step) in FINDINGS.items():
        severity: Severity = "error" if name in UNUSABLE else "warning"
        limit = f" (max_length {max_length})" if name in ("cut_off", "truncated") else ""
        cut = f", {lost} supervised tokens lost in all" if name == "truncated" else ""
        evidence = {"max_length": max_length, "lost_tokens": lost} if limit else {}
        rows = np.flatnonzero(concerned[name]).tolist()
        for made in finding(name, severity, rows, total, meaning + limit + cut, step, **evidence):
            found[name] = made
    return AuditReport(total, int(length.sum()), int(kept.sum()), lost, max_length, found)


def _supervision(index: int, row: Mapping[str, Any], max_length: int | None, keep_end: bool) -> tuple[int, int, int]:
    """Tokens kept, supervised tokens kept, supervised tokens cut off."""
    if "input_ids" not in row:
        raise DataError(
            f"row {index + 1} has no input_ids (columns: {', '.join(row) or 'none'}); audit rows after tokenisation"
        )
    length = len(row["input_ids"])
    labels = row["labels"] if row.get("labels") is not None else row["input_ids"]
    if len(labels) != length:
        raise DataError(
            f"row {index + 1} has {length} input_ids but {len(labels)} labels; expected one label a token, -100 to ignore"
        )
    end = length if max_length is None else min(length, max_length)
    first = length - end + 1 if keep_end else 1  # the first token that is kept is predicted by nothing
    trained = np.asarray(labels) != IGNORE_INDEX
    total = int(trained[1:].sum())
    kept = int(trained[first : first + end - 1].sum()) if end else 0
    return end, kept, total - kept
