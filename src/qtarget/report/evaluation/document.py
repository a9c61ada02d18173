"""From a record a row to one JSON document: means with intervals, paired differences, and the rows that tell models apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from qtarget.core.errors import counted, inflected
from qtarget.report.intervals import paired_interval, ratio_interval, share_interval

SCHEMA_VERSION = 1
ROWS_SHOWN = 200
"""Rows on which models differ that the document holds with their texts; the records file has all."""

Results = Mapping[tuple[str, str], Mapping[str, Any]]
"""(set, contender) -> ``nll`` and ``completion``, a record a row or None; of a row whose answer has weight 0 no completion."""


@dataclass(frozen=True)
class Entry:
    """One contender, as the document names it.

    Attributes:
        name: in the table.
        model: where it is.
        base: the name of its untrained base; None for a base.
        notes: what a reader of its numbers must know.
        max_new_tokens: of completions, by set.
    """

    name: str
    model: str
    base: str | None
    notes: Sequence[str]
    max_new_tokens: Mapping[str, int]


def evaluation_document(
    entries: Sequence[Entry],
    sets: Mapping[str, Mapping[str, Any]],
    results: Results,
    *,
    settings: Mapping[str, Any],
    texts: Mapping[str, Sequence[Mapping[str, str]] | None],
    seed: int = 0,
) -> dict[str, Any]:
    """The whole evaluation as JSON; every number of the page stands here, and nothing that changes from run to run.

    Args:
        entries: bases first.
        sets: ``data`` (and ``forgetting``): file, rows, fingerprint, metric.
        results: a record a row.
        settings: how completions were made.
        texts: of each set ``prompt`` and ``reference`` a row, or None where nothing was asked.
        seed: of the bootstrap.
    """
    contenders = []
    for entry in entries:
        found = {name: _summary(name, entry, results, seed) for name in sets}
        notes = [*entry.notes, *(note for name in sets for note in _notes(name, entry, results))]
        contenders.append(
            {"name": entry.name, "model": entry.model, "base": entry.base, "max_new_tokens": dict(entry.max_new_tokens),
             "sets": found, "notes": notes}
        )  # fmt: skip
    trained = [entry.name for entry in entries if entry.base is not None]
    pairs = [
        {"a": a, "b": b, "sets": {name: _difference(name, a, b, results, seed) for name in sets}}
        for a, b in combinations(trained, 2)
    ]
    document = {
        "kind": "qtarget evaluation",
        "schema_version": SCHEMA_VERSION,
        "sets": {name: dict(about) for name, about in sets.items()},
        "settings": dict(settings),
        "contenders": contenders,
        "pairs": pairs,
        "rows": {
            name: differing_rows(name, [e.name for e in entries], results, texts[name] or []) for name in sets
        },
    }  # fmt: skip
    return {"kind": document["kind"], "finding": finding(document), **document}


def _summary(name: str, entry: Entry, results: Results, seed: int) -> dict[str, Any]:
    mine = results[name, entry.name]
    summary: dict[str, Any] = {"nll": None, "completion": None, "to_base": None}
    scored = [line for line in mine["nll"] or [] if line["tokens"]]
    if scored:
        nats, tokens = [line["nats"] for line in scored], [line["tokens"] for line in scored]
        summary["nll"] = ratio_interval(nats, tokens, seed) | {"rows": len(scored), "tokens": sum(tokens)}
    if mine["completion"] is not None:
        said = [line for line in mine["completion"] if line is not None]
        scores, unfinished = [fmean(line["scores"]) for line in said], [1 - fmean(line["stopped"]) for line in said]
        summary["completion"] = share_interval(scores, seed) | {"rows": len(scores), "unfinished": fmean(unfinished)}
    if entry.base is not None:
        summary["to_base"] = _difference(name, entry.name, entry.base, results, seed)
    return summary


def _difference(name: str, a: str, b: str, results: Results, seed: int) -> dict[str, Any]:
    """``a - b`` on the same rows; nll only where both read every row as the same tokens."""
    one, other = results[name, a], results[name, b]
    out: dict[str, Any] = {"nll": None, "completion": None}
    if _same_tokens(one, other):
        pairs = [(x, y) for x, y in zip(one["nll"], other["nll"], strict=True) if x["tokens"]]
        if pairs:
            nats = [[line["nats"] for line in side] for side in zip(*pairs, strict=True)]
            out["nll"] = paired_interval(nats[0], nats[1], [x["tokens"] for x, _ in pairs], seed)
    if one["completion"] is not None and other["completion"] is not None:
        scores = [[fmean(line["scores"]) for line in side["completion"] if line is not None] for side in (one, other)]
        out["completion"] = paired_interval(scores[0], scores[1], None, seed, reach=1.0)
    return out


def _same_tokens(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one["nll"] is None or other["nll"] is None:
        return False
    return all(a["key"] == b["key"] for a, b in zip(one["nll"], other["nll"], strict=True))


def _notes(name: str, entry: Entry, results: Results) -> list[str]:
    mine, notes = results[name, entry.name], []
    lost = sum(not line["tokens"] for line in mine["nll"] or [])
    if lost:
        notes.append(
            f"{name}: {counted(lost, 'row')} {inflected(lost, 'have')} no answer token that counts, within max_length and of a "
            "weight above 0, and no nll"
        )
    if entry.base is not None and mine["nll"] is not None and not _same_tokens(mine, results[name, entry.base]):
        notes.append(f"{name}: rows are other tokens than for {entry.base}, so their nll is not compared")
    if mine["completion"] is not None:
        unasked = sum(line is None for line in mine["completion"])
        if unasked:
            notes.append(
                f"{name}: {counted(unasked, 'row')} {inflected(unasked, 'have')} an answer of weight 0, and no completion"
            )
        cut = sum(not all(line["stopped"]) for line in mine["completion"] if line is not None)
        if cut:
            limit = entry.max_new_tokens.get(name)
            notes.append(
                f"{name}: {counted(cut, 'row')} {inflected(cut, 'have')} a completion cut off at {limit} new tokens; "
                "--max-new-tokens allows more"
            )
    return notes


def differing_rows(
    name: str, contenders: Sequence[str], results: Results, texts: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """The rows on which contenders get different scores, largest differences first: how many, and the first with texts."""
    lines = {one: results[name, one]["completion"] for one in contenders}
    if not texts or any(value is None for value in lines.values()):
        return {"differing": 0, "shown": []}
    spread = []
    for i in range(len(texts)):
        if any(lines[one][i] is None for one in contenders):
            continue
        scores = [fmean(lines[one][i]["scores"]) for one in contenders]
        if max(scores) > min(scores):
            spread.append((min(scores) - max(scores), i))
    shown = [
        {
            "row": i,
            **texts[i],
            "answers": [
                {"completion": lines[one][i]["completions"][0], "score": fmean(lines[one][i]["scores"])}
                for one in contenders
            ],
        }
        for _, i in sorted(spread)[:ROWS_SHOWN]
    ]
    return {"differing": len(spread), "shown": shown}


# -- words ------------------------------------------------------------------------------------------------------


def finding(document: Mapping[str, Any]) -> str:
    """One sentence: the best of the trained, its base, the difference and what may be said about it."""
    trained = [one for one in document["contenders"] if one["base"] is not None]
    if not trained:
        return "; ".join(f"{one['name']}: {_level(one)}" for one in document["contenders"])
    completed = all(one["sets"]["data"]["completion"] is not None for one in trained)
    what = "completion" if completed else "nll"
    known = [one for one in trained if one["sets"]["data"][what] is not None]
    if not known:
        return "No row has an answer token, so nothing was measured"
    best = (max if completed else min)(known, key=lambda one: one["sets"]["data"][what]["mean"])
    base = next(one for one in document["contenders"] if one["name"] == best["base"])
    rows = best["sets"]["data"][what]["rows"]
    parts = [f"{best['name']} {_level(best)}, its base {base['name']} {_level(base)}"]
    parts.append(_verdict(best["sets"]["data"]["to_base"][what], what, rows))
    second = _second(document, known, best, completed)
    return "; ".join([*parts, *([second] if second else []), *_forgotten(document, best)])


def _level(one: Mapping[str, Any]) -> str:
    found = one["sets"]["data"]
    if found["completion"] is not None:
        return f"completes {percent(found['completion'])} of {counted(found['completion']['rows'], 'row')}"
    return f"has an nll of {nats(found['nll'])}" if found["nll"] is not None else "was not measured"


def _verdict(difference: Mapping[str, Any] | None, what: str, rows: int) -> str:
    if difference is None:
        return "the two are not comparable"
    words = points(difference) if what == "completion" else f"{nats(difference, '+')} nats a token"
    if difference["low"] <= 0 <= difference["high"]:
        return f"{words}: no difference that {counted(rows, 'row')} can show"
    return words


def _second(document: Mapping[str, Any], known: Sequence[Any], best: Any, completed: bool) -> str | None:
    others = [one for one in known if one is not best]
    if not others:
        return None
    what = "completion" if completed else "nll"
    second = (max if completed else min)(others, key=lambda one: one["sets"]["data"][what]["mean"])
    pair = next(p for p in document["pairs"] if {p["a"], p["b"]} == {best["name"], second["name"]})
    difference = pair["sets"]["data"][what]
    if difference is not None and pair["a"] != best["name"]:
        difference = {"mean": -difference["mean"], "low": -difference["high"], "high": -difference["low"]}
    return f"against {second['name']}: {_verdict(difference, what, best['sets']['data'][what]['rows'])}"


def _forgotten(document: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
    if "forgetting" not in document["sets"]:
        return []
    change = best["sets"]["forgetting"]["to_base"]
    words = []
    if change["completion"] is not None:
        words.append(points(change["completion"]))
    if change["nll"] is not None:
        words.append(f"{nats(change['nll'], '+')} nats a token")
    return [f"on {document['sets']['forgetting']['file']}: {', '.join(words) or 'not comparable'}"]


def percent(found: Mapping[str, float]) -> str:
    """A share with its interval.

    Example:
        >>> percent({"mean": 0.5, "low": 0.4, "high": 0.6})
        '50.0 % (40.0 .. 60.0)'
    """
    return f"{100 * found['mean']:.1f} % ({100 * found['low']:.1f} .. {100 * found['high']:.1f})"


def points(found: Mapping[str, float]) -> str:
    """A difference of shares with its interval.

    Example:
        >>> points({"mean": 0.041, "low": 0.012, "high": 0.07})
        '+4.1 points (+1.2 .. +7.0)'
    """
    return f"{100 * found['mean']:+.1f} points ({100 * found['low']:+.1f} .. {100 * found['high']:+.1f})"


def nats(found: Mapping[str, float], sign: str = "") -> str:
    """Nats a token with their interval.

    Example:
        >>> nats({"mean": 1.25, "low": 1.0, "high": 1.5})
        '1.250 (1.000 .. 1.500)'
    """
    return f"{found['mean']:{sign}.3f} ({found['low']:{sign}.3f} .. {found['high']:{sign}.3f})"
