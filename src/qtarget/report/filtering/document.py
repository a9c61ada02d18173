"""From a decision to one JSON document: the verdict, what it rests on, its histogram, and the rows at the border."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qtarget.data.columns import LIGHT
from qtarget.data.roc import roc_auc
from qtarget.filtering import WITNESSES, Decision, ScoredRows
from qtarget.filtering.decision import As

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
    form: As = "drop",
    own: int = 0,
    light: Sequence[str] = (),
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
        form: whether rows are dropped, or weighed where the evidence tells.
        own: judged rows that had a weight before, which is multiplied.
        light: lines about the rows that hardly teach, by source.
    """
    scores = row_scores(rows, decision, counted)
    dropped = set() if form == "weight" else set(rows.numbers[~decision.keep].tolist())
    weights = weights_of(decision, rows, count) if form == "weight" and decision.tells else None
    return {
        "kind": "qtarget filter",
        "schema_version": SCHEMA_VERSION,
        "summary": decision.summary,
        "verdict": decision.verdict,
        "rule": decision.rule,
        "as": form,
        "threshold": decision.threshold,
        "data": title,
        "cache": cache,
        "rows": count,
        "kept": count - len(dropped),
        "dropped": len(dropped),
        "not_judged": count - len(rows),
        "facts": dict(decision.facts),
        "witnesses": {name: one.about for name, one in WITNESSES.items() if name in scores},
        "weights": None if weights is None else _totals(weights[rows.numbers], own, light),
        "groups": None if groups is None else _counts(*groups, dropped, weights),
        "histogram": histogram(decision),
        "roc": None if marks is None else roc(scores, marks, decision.rule),
        "borders": borders(decision, rows, scores, marks, decode, form),
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


def weights_of(decision: Decision, rows: ScoredRows, count: int) -> np.ndarray:
    """``[count]`` P(right) of every row of the data set; NaN where a row was not judged."""
    out = np.full(count, np.nan)
    out[rows.numbers] = decision.weights
    return out


def _totals(weights: np.ndarray, own: int, lines: Sequence[str]) -> dict[str, Any]:
    light = int((weights < LIGHT).sum())
    found = {"sum": round(float(weights.sum()), 4), "mean": round(float(weights.mean()), 6), "light": light}
    return {**found, "own": own, "lines": list(lines)}


def _counts(column: str, values: Sequence[str], dropped: set[int], weights: np.ndarray | None) -> dict[str, Any]:
    """Rows of each value, the commonest first; how many are dropped, or the sum of their weights and how many hardly teach."""
    of, out = Counter(values), Counter(values[row] for row in dropped)
    lines = [{"value": value, "rows": number, "dropped": out[value]} for value, number in of.most_common()]
    if weights is not None:
        place_of = {line["value"]: place for place, line in enumerate(lines)}
        places = np.array([place_of[value] for value in values])
        sums = np.bincount(places, np.nan_to_num(weights), len(lines))
        light = np.bincount(places, weights < LIGHT, len(lines))
        for line, total, few in zip(lines, sums, light, strict=True):
            line |= {"weight": round(float(total), 4), "light": int(few)}
    return {"column": column, "rows": lines}


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


KINDS_OF: Mapping[As, tuple[str, str, str]] = {
    "drop": ("worst kept", "worst dropped", "best dropped"),
    "weight": ("worst of those likelier right", "least weight", "best of those likelier bad"),
}
"""What the page calls the rows on either side of the threshold."""


def borders(
    decision: Decision,
    rows: ScoredRows,
    scores: Mapping[str, np.ndarray],
    marks: np.ndarray | None,
    decode: Decode,
    form: As = "drop",
) -> dict[str, list[dict[str, Any]]]:
    """The rows nearest to the threshold, the worst kept, the best dropped and the worst of all, with their texts.

    Rows that are weighed are told apart at the same place: those likelier right than bad, and the others.
    """
    worst, lowest, best = KINDS_OF[form]
    order = np.argsort(-decision.score, kind="stable")
    kept, dropped = order[decision.keep[order]], order[~decision.keep[order]]
    chosen = {lowest: dropped[:BORDER_ROWS], best: dropped[::-1][:BORDER_ROWS]}
    chosen = {worst: kept[:BORDER_ROWS]} | chosen
    if decision.threshold is not None:
        near = np.argsort(np.abs(decision.score - decision.threshold), kind="stable")[:BORDER_ROWS]
        chosen = {"nearest to the threshold": near} | chosen
    return {
        name: [_case(int(i), decision, rows, scores, marks, decode, form) for i in places]
        for name, places in chosen.items()
    }


def _case(
    place: int,
    decision: Decision,
    rows: ScoredRows,
    scores: Mapping[str, np.ndarray],
    marks: np.ndarray | None,
    decode: Decode,
    form: As,
) -> dict[str, Any]:
    begin, end = int(rows.offsets[place]), int(rows.offsets[place + 1])
    ids, trained = rows.ids[begin:end], rows.trained[begin:end]
    first = int(np.argmax(trained))
    return {
        "row": int(rows.numbers[place]),
        "kept": form == "weight" or bool(decision.keep[place]),
        "posterior": round(float(decision.posterior[place]), 4),
        "scores": {name: round(float(values[place]), 3) for name, values in scores.items()},
        "reason": decision.reason(place, form),
        "marked": None if marks is None else bool(marks[place]),
        "prompt": decode(ids[:first].tolist())[-LONGEST_TEXT:],
        "answer": decode(ids[first:].tolist())[:LONGEST_TEXT],
    }
