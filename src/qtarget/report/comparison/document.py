"""From the runs of a comparison to one JSON document: levels, differences to the baseline that hold together, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, isfinite
from typing import Any

import numpy as np

from qtarget.core.errors import counted, inflected
from qtarget.report.comparison.simultaneous import Differences, simultaneous_differences
from qtarget.report.comparison.verdict import Line, Measure, verdict

SCHEMA_VERSION = 1
ROWS_SHOWN = 200
"""Rows on which the two models differ that the document holds with their texts."""


@dataclass(frozen=True)
class Scored:
    """One set measured by one contender.

    Attributes:
        scores: ``[seeds][rows]``, larger is better.
        weights: ``[rows]``; a row of weight 0 judges nobody.
        nll: ``[seeds]`` nats a token over all rows; None where it was not measured.
        cut: answers of all seeds that were stopped before their end.
    """

    scores: Sequence[Sequence[float]]
    weights: Sequence[float]
    nll: Sequence[float] | None = None
    cut: int = 0

    @property
    def judging(self) -> int:
        """Rows that judge."""
        return sum(weight > 0 for weight in self.weights)

    @property
    def mostly_cut(self) -> bool:
        """Whether more than half of the answers were stopped before their end."""
        return 2 * self.cut > len(self.scores) * self.judging


@dataclass(frozen=True)
class Entry:
    """One contender with its runs.

    Attributes:
        overrides: keys of the config that are its own.
        sets: ``data``, and ``forgetting`` if there is one.
        tuning: rate and scores on all rows and on each half.
        rates: for the rows of half 0 and of half 1.
        best: the rate for whoever trains it.
        seconds: of each final run, memory_bytes the most of any.
        curve, validation: ``[step, nats a token]``, means over seeds.
        texts: a completion a row by the first seed (None for a row that is not asked), or None.
    """

    name: str
    sets: Mapping[str, Scored]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tuning: Sequence[Mapping[str, Any]] = ()
    rates: Sequence[float] = ()
    best: float | None = None
    seconds: Sequence[float] = ()
    memory_bytes: int | None = None
    curve: Sequence[Sequence[float | None]] = ()
    validation: Sequence[Sequence[float | None]] = ()
    texts: Sequence[str | None] | None = None
    notes: Sequence[str] = ()


def comparison_document(
    base: Entry,
    entries: Sequence[Entry],
    *,
    groups: Sequence[int],
    sets: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    left_out: Sequence[str] = (),
    cost: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole comparison as JSON; every number of the page stands here.

    Args:
        base: untrained, one seed.
        entries: the baseline first.
        groups: of the judged rows, equal for one prompt.
        sets: by name: file, rows, metric and what a reader must know of them.
        settings: of all runs.
        rows: ``prompt``, ``reference`` and perhaps ``row``, the number in the file from 0, of the judged rows.
        left_out: what was not run, and why.
        cost: seconds and runs in all.
    """
    asked = [entry.sets["data"] for entry in entries]
    cut_off = all(one.mostly_cut for one in asked)
    measure = Measure(sets["data"]["metric"], asked[0].judging, len(asked[0].scores), cut_off)
    lines = _lines(entries, groups)
    untrained = _one_difference(base, entries[0], groups)
    found = verdict(lines, measure, _against(base, entries, groups, lines))
    document: dict[str, Any] = {
        "kind": "qtarget comparison",
        "schema_version": SCHEMA_VERSION,
        "finding": found.sentence,
        "take": found.take,
        "better": list(found.better),
        "baseline": entries[0].name,
        "measure": asdict(measure),
        "certainty": measure.certainty,
        "sets": {name: {**about, "rows": base.sets[name].judging} for name, about in sets.items()},
        "settings": dict(settings),
        "base": _contender(base, untrained, base, groups),
        "contenders": [_contender(entry, line, base, groups) for entry, line in zip(entries, lines, strict=True)],
        "left_out": [*left_out, *_idle_rows(base, sets)],
        "cost": dict(cost or {}),
    }
    other = _other(lines, found.take)
    if other is not None:
        pair = [next(entry for entry in entries if entry.name == name) for name in (other, entries[0].name)]
        document["rows"] = {"models": [entry.name for entry in pair], **differing_rows(pair[0], pair[1], rows)}
    else:
        document["rows"] = {"models": [], "differing": 0, "shown": []}
    return document


def _idle_rows(base: Entry, sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows that judge nobody, a line a set that has any."""
    idle = {name: len(base.sets[name].weights) - base.sets[name].judging for name in sets}
    return [
        f"{sets[name]['file']}: {counted(rows, 'row')} whose answer has weight 0, or no token within max_length, "
        f"{inflected(rows, 'judge')} nobody"
        for name, rows in idle.items() if rows
    ]  # fmt: skip


def _lines(entries: Sequence[Entry], groups: Sequence[int]) -> list[Line]:
    """Level and difference to the first, one a contender; the differences' intervals hold together."""
    data = [entry.sets["data"] for entry in entries]
    if len(entries) == 1:
        level, deviation = _mean(data[0]), 0.0
        return [Line(entries[0].name, level, None, deviation)]
    reach = _reach([one.scores for one in data])
    found = simultaneous_differences([one.scores for one in data], data[0].weights, groups, reach=reach or 0.0)
    out = [Line(entries[0].name, float(found.levels[0]), None, float(found.seed_deviations[0]))]
    for i, entry in enumerate(entries[1:]):
        ends = _ends(found, i, reach)
        enough = float(found.enough_rows[i])
        out.append(
            Line(
                entry.name,
                float(found.levels[i + 1]),
                ends,
                float(found.seed_deviations[i + 1]),
                float(found.confidences[i]),
                ceil(enough) if isfinite(enough) else None,
            )
        )
    return out


def _mean(one: Scored) -> float:
    return float(np.average(np.asarray(one.scores, np.float64).mean(0), weights=np.asarray(one.weights)))


def _one_difference(one: Entry, other: Entry, groups: Sequence[int]) -> Line:
    """``one - other`` alone, with an interval of its own; a model without seeds is the same in every seed."""
    return Line(one.name, _mean(one.sets["data"]), _pair(one, other, "data", groups), 0.0)


def _pair(one: Entry, other: Entry, name: str, groups: Sequence[int] | None) -> dict[str, float]:
    a, b = one.sets[name], other.sets[name]
    seeds = max(len(a.scores), len(b.scores))
    both = [np.broadcast_to(np.asarray(x.scores, np.float64), (seeds, len(x.weights))) for x in (b, a)]
    reach = _reach([a.scores, b.scores])
    found = simultaneous_differences(np.stack(both), a.weights, groups, reach=reach or 0.0)
    return _ends(found, 0, reach)


def _ends(found: Differences, i: int, reach: float | None) -> dict[str, float]:
    ends = float(found.means[i]), float(found.lows[i]), float(found.highs[i])
    if reach is not None:
        ends = ends[0], max(ends[1], -reach), min(ends[2], reach)
    return dict(zip(("mean", "low", "high"), ends, strict=True))


def _reach(scores: Sequence[Any]) -> float | None:
    """How far two means can lie apart: shares of right answers no further than 1; None where there is no bound."""
    lowest, highest = min(np.min(one) for one in scores), max(np.max(one) for one in scores)
    return 1.0 if 0 <= lowest <= highest <= 1 else None


def _against(base: Entry, entries: Sequence[Entry], groups: Sequence[int], lines: Sequence[Line]) -> dict[str, Line]:
    """The untrained base minus each contender: whether training helps at all."""
    return {entry.name: _one_difference(base, entry, groups) for entry, _ in zip(entries, lines, strict=True)}


def _other(lines: Sequence[Line], take: str | None) -> str | None:
    """Whose rows are shown beside the baseline's: the one taken, else the best of the others."""
    others = [line for line in lines if line.difference is not None]
    if not others:
        return None
    return take if any(line.name == take for line in others) else max(others, key=lambda line: line.level).name


def _contender(entry: Entry, line: Line, base: Entry, groups: Sequence[int]) -> dict[str, Any]:
    forgetting = None
    if "forgetting" in entry.sets:
        forgetting = {"level": _mean(entry.sets["forgetting"]), "nll": _average(entry.sets["forgetting"].nll)}
        forgetting["to_base"] = None if entry is base else _pair(entry, base, "forgetting", None)
    by_seed = [_mean(Scored([one], entry.sets["data"].weights)) for one in entry.sets["data"].scores]
    return {
        "name": entry.name,
        "overrides": dict(entry.overrides),
        "level": line.level,
        "by_seed": by_seed,
        "seed_deviation": line.deviation,
        "to_baseline": line.difference,
        "confidence": line.confidence,
        "enough_rows": line.enough_rows,
        "nll": _average(entry.sets["data"].nll),
        "forgetting": forgetting,
        "tuning": [dict(one) for one in entry.tuning],
        "rates": list(entry.rates),
        "best_rate": entry.best,
        "seconds": list(entry.seconds),
        "memory_bytes": entry.memory_bytes,
        "curve": [list(point) for point in entry.curve],
        "validation": [list(point) for point in entry.validation],
        "notes": list(entry.notes),
    }


def _average(values: Sequence[float] | None) -> float | None:
    return None if not values else float(np.mean(values))


def differing_rows(one: Entry, other: Entry, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows on which two contenders' scores, means over seeds, differ; largest differences first, first seeds' answers."""
    means = [np.asarray(entry.sets["data"].scores, np.float64).mean(0) for entry in (one, other)]
    change = np.abs(means[0] - means[1])
    places = [int(i) for i in np.argsort(-change, kind="stable") if change[i] > 0]
    shown = [
        {
            "row": i,
            **rows[i],
            "answers": [
                {"completion": entry.texts[i] if entry.texts else None, "score": float(mean[i])}
                for entry, mean in zip((one, other), means, strict=True)
            ],
        }
        for i in places[:ROWS_SHOWN]
    ]
    return {"differing": len(places), "shown": shown}


def level_words(level: float, measure: Measure) -> str:
    """A level as people read it: a share of right answers, or nats a token.

    Example:
        >>> level_words(0.5, Measure("exact", 10, 3)), level_words(-1.25, Measure("nll", 10, 3))
        ('50.0 %', '1.250')
    """
    return f"{-level:.3f}" if measure.is_nll else f"{100 * level:.1f} %"


def memory_words(count: int | None) -> str:
    """Bytes in GB.

    Example:
        >>> memory_words(1_500_000_000), memory_words(None)
        ('1.5 GB', '-')
    """
    return "-" if count is None else f"{count / 1e9:.1f} GB"
