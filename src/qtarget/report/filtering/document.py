"""From a decision to one JSON document: the verdict, what it rests on, its histogram, and the rows at the border."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qtarget.data.roc import roc_auc
from qtarget.filtering import WITNESSES, Decision, ScoredRows

SCHEMA_VERSION = 1
BORDER_ROWS = 20
"""Rows of each kind that the document holds with their texts."""
BINS = 60
CURVE_POINTS = 101
LONGEST_TEXT = 2000
"""Characters of a prompt or an answer that the document holds."""
Decode = Callable[[list[int]], str]


def filter_document(
    decision: Decision,
    rows: ScoredRows,
    count: int,
    *,
    title: str,
    cache: str,
    decode: Decode,
    marks: np.ndarray | None = None,
    groups: tuple[str, Sequence[str]] | None = None,
    counted: bool = True,
) -> dict[str, Any]:
    """Everything that the page shows, and under ``scores`` every row's numbers as arrays, which the caller takes out.

    Args:
        rows: the judged rows, in the decision's order.
        count: rows of the data set.
        title: the data in a few words.
        cache: what judged.
        decode: token ids to text.
        marks: ``[rows]`` which judged rows are known to be bad.
        groups: a column's name, and its value for every row of the data set.
        counted: whether witnesses that count over all rows are shown beside the one that decided.
    """
    scores = row_scores(rows, decision, counted)
    dropped = set(rows.numbers[~decision.keep].tolist())
    return {
        "kind": "qtarget filter",
        "schema_version": SCHEMA_VERSION,
        "summary": decision.summary,
        "verdict": decision.verdict,
        "rule": decision.rule,
        "threshold": decision.threshold,
        "data": title,
        "cache": cache,
        "rows": count,
        "kept": count - len(dropped),
        "dropped": len(dropped),
        "not_judged": count - len(rows),
        "facts": dict(decision.facts),
        "witnesses": {name: one.about for name, one in WITNESSES.items() if name in scores},
        "groups": None if groups is None else _counts(*groups, dropped),
        "histogram": histogram(decision),
        "roc": None if marks is None else roc(scores, marks, decision.rule),
        "borders": borders(decision, rows, scores, marks, decode),
        "scores": scores,
    }


def row_scores(rows: ScoredRows, decision: Decision, counted: bool) -> dict[str, np.ndarray]:
    """``[rows]`` of every witness that costs nothing more, the plain surprise in two forms first."""
    surprise = -rows.log_probs
    out = {"nll": rows.mean(surprise), "worst_nll": rows.worst(surprise)}
    for name, witness in WITNESSES.items():
        absent = (
            (name in ("agreement", "combined") and not counted)
            or (name == "gain" and rows.alone is None)
            or (witness.asks_copies and (rows.crossfit is None or rows.crossfit_entropy is None))
        )
        if name == decision.rule:
            out[name] = decision.score
        elif not absent:
            out[name] = witness.score(rows)
    return out


def _counts(column: str, values: Sequence[str], dropped: set[int]) -> dict[str, Any]:
    of, out = Counter(values), Counter(values[row] for row in dropped)
    return {
        "column": column,
        "rows": [{"value": value, "rows": number, "dropped": out[value]} for value, number in of.most_common()],
    }


def histogram(decision: Decision) -> dict[str, Any] | None:
    """Rows by score, and how many of either component are expected in each bin; None without scores."""
    if decision.verdict == "not filtered" or not len(decision.score):
        return None
    counts, edges = np.histogram(decision.score, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    out: dict[str, Any] = {"middles": middles.round(4).tolist(), "rows": counts.tolist(), "good": None, "bad": None}
    if decision.mixture is not None:
        scale = len(decision.score) * (edges[1] - edges[0])
        good, bad = decision.mixture.log_densities(middles)
        out |= {"good": (np.exp(good) * scale).round(3).tolist(), "bad": (np.exp(bad) * scale).round(3).tolist()}
    return out


def roc(scores: Mapping[str, np.ndarray], marks: np.ndarray, rule: str) -> dict[str, Any]:
    """How well each score finds the marked rows, and the curve of the one that decided, if there are rows of both kinds."""
    auc = {name: roc_auc(values, marks) for name, values in scores.items()}
    curve = None
    if rule in scores and 0 < marks.sum() < len(marks):
        found = marks[np.argsort(-scores[rule], kind="stable")]
        at = np.unique(np.linspace(0, len(found), CURVE_POINTS).astype(int))
        hits = np.concatenate([[0], np.cumsum(found)])[at]
        curve = np.stack([(at - hits) / (~marks).sum(), hits / marks.sum()], axis=1).round(4).tolist()
    return {"marked": int(marks.sum()), "auc": auc, "curve": curve}


def borders(
    decision: Decision, rows: ScoredRows, scores: Mapping[str, np.ndarray], marks: np.ndarray | None, decode: Decode
) -> dict[str, list[dict[str, Any]]]:
    """The rows nearest to the threshold, the worst kept, the best dropped and the worst of all, with their texts."""
    order = np.argsort(-decision.score, kind="stable")
    kept, dropped = order[decision.keep[order]], order[~decision.keep[order]]
    chosen = {"worst dropped": dropped[:BORDER_ROWS], "best dropped": dropped[::-1][:BORDER_ROWS]}
    chosen = {"worst kept": kept[:BORDER_ROWS]} | chosen
    if decision.threshold is not None:
        near = np.argsort(np.abs(decision.score - decision.threshold), kind="stable")[:BORDER_ROWS]
        chosen = {"nearest to the threshold": near} | chosen
    return {
        name: [_case(int(i), decision, rows, scores, marks, decode) for i in places] for name, places in chosen.items()
    }


def _case(
    place: int,
    decision: Decision,
    rows: ScoredRows,
    scores: Mapping[str, np.ndarray],
    marks: np.ndarray | None,
    decode: Decode,
) -> dict[str, Any]:
    begin, end = int(rows.offsets[place]), int(rows.offsets[place + 1])
    ids, trained = rows.ids[begin:end], rows.trained[begin:end]
    first = int(np.argmax(trained))
    return {
        "row": int(rows.numbers[place]),
        "kept": bool(decision.keep[place]),
        "posterior": round(float(decision.posterior[place]), 4),
        "scores": {name: round(float(values[place]), 3) for name, values in scores.items()},
        "reason": decision.reason(place),
        "marked": None if marks is None else bool(marks[place]),
        "prompt": decode(ids[:first].tolist())[-LONGEST_TEXT:],
        "answer": decode(ids[first:].tolist())[:LONGEST_TEXT],
    }
