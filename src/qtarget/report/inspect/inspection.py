"""What ``qtarget inspect`` knows of some rows, and its overview: everything but single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.report.inspect.distribution import distribution
from qtarget.report.inspect.marks import UNPLACED, scored
from qtarget.report.inspect.quantise import six
from qtarget.report.inspect.weights import TargetNumbers
from qtarget.report.tokens import ModelNumbers, TokenRows


@dataclass(frozen=True)
class View:
    """One model's numbers, and each target's at them: the base, or a checkpoint."""

    live: ModelNumbers
    targets: list[TargetNumbers]


@dataclass(frozen=True)
class Inspection:
    """All that is known of some rows.

    Attributes:
        title: of the page.
        about: facts for people, as they are shown: name and text.
        rows: the tokens.
        views: the base first.
        hidden: targets that cannot be shown, with the reason.
        texts: text of each token id that occurs anywhere.
        groups: a name for each row, and what it is called (``source``).
        row_marks, token_marks: known noise, by row (booleans) and by trained token (0, 1, or ``UNPLACED``).
        audit: ``DataAudit.as_dict()``, or None.
    """

    title: str
    about: list[tuple[str, str]]
    rows: TokenRows
    views: list[View]
    hidden: dict[str, str]
    texts: Mapping[int, str]
    groups: tuple[str, list[str]] | None = None
    row_marks: np.ndarray | None = None
    token_marks: np.ndarray | None = None
    audit: Mapping[str, Any] | None = None


def row_means(values: np.ndarray, rows: TokenRows) -> np.ndarray:
    """``[rows]`` mean over each row's trained tokens; NaN for a row without any."""
    index = rows.row_of_trained
    counts = np.bincount(index, minlength=len(rows))
    sums = np.bincount(index, values.astype(np.float64), len(rows))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def plain(values: np.ndarray) -> list[float | None]:
    """A column as JSON numbers, six digits."""
    return [six(v) if np.isfinite(v) else None for v in values.tolist()]


def marks_of(found: Inspection, view: View) -> dict[str, Any] | None:
    """ROC of each of a model's scores against the marks, by row and by token."""
    if found.row_marks is None:
        return None
    rows = found.rows
    surprise, entropy = -view.live.label_log_probs, view.live.entropy
    by_token = {"surprise, -log p": surprise, "surprise - entropy": surprise - entropy, "entropy": entropy}
    if view.live.crossfit is not None:
        by_token["surprise of copies that have not seen the row"] = -view.live.crossfit
    by_token |= {f"low weight under {t.name}": -t.label_weights for t in view.targets if np.ptp(t.label_weights) > 0}
    trained = np.diff(rows.trained_offsets) > 0
    by_row = {f"mean {name}": row_means(v, rows)[trained] for name, v in by_token.items()}
    largest = [surprise[a:b].max() for a, b in zip(rows.trained_offsets, rows.trained_offsets[1:]) if b > a]
    by_row["largest surprise"] = np.array(largest)
    by_row["trained tokens"] = np.diff(rows.trained_offsets)[trained].astype(np.float64)
    kept = found.row_marks[trained]
    out = {"rows": len(kept), "marked_rows": int(kept.sum()), "by_row": scored(by_row, kept, rows=True)}
    if found.token_marks is not None:
        placed = found.token_marks != UNPLACED
        marked = found.token_marks[placed] == 1
        out["unplaced_rows"] = len(np.unique(rows.row_of_trained[~placed]))
        if marked.any():
            # tokens of a row whose spans were not found count on neither side
            by_token = {name: scores[placed] for name, scores in by_token.items()}
            out |= {
                "tokens": len(marked),
                "marked_tokens": int(marked.sum()),
                "by_token": scored(by_token, marked, rows=False),
            }
    return out


def overview(found: Inspection) -> dict[str, Any]:
    """Everything but single tokens: exact numbers over all rows."""
    rows = found.rows
    views = []
    for view in found.views:
        groups = found.groups[1] if found.groups else None
        views.append(
            {
                "model": view.live.name,
                "top_k": view.live.top_k,
                **distribution(rows, view.live, view.targets, groups),
                "marks": marks_of(found, view),
                "row_nll": plain(row_means(-view.live.label_log_probs, rows)),
                "row_crossfit": None if view.live.crossfit is None else plain(row_means(-view.live.crossfit, rows)),
                "row_weight": [plain(row_means(t.label_weights, rows)) for t in view.targets],
                "row_moved": [plain(row_means(t.moved, rows)) for t in view.targets],
            }
        )
    return {
        "title": found.title,
        "about": [list(pair) for pair in found.about],
        "targets": [t.name for t in found.views[0].targets],
        "hidden": found.hidden,
        "views": views,
        "group": found.groups[0] if found.groups else None,
        "groups": found.groups[1] if found.groups else None,
        "row_numbers": rows.numbers.tolist(),
        "row_tokens": rows.lengths.tolist(),
        "row_trained": np.diff(rows.trained_offsets).tolist(),
        "row_marked": None if found.row_marks is None else found.row_marks.tolist(),
        "audit": found.audit,
    }
