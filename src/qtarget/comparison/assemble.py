"""From finished runs to the entries of the document: each row from the run whose rate was chosen without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtarget.comparison.compare import Found, row_scores, texts_file
from qtarget.comparison.jobs import Contender, Job, Result
from qtarget.core.errors import counted, inflected
from qtarget.report.comparison.document import Entry, Scored


def base_entry(found: Found, name: str, folder: Path) -> Entry:
    """The untrained model."""
    sets = {which: _whole([found.base], which) for which in found.base["sets"]}
    return Entry(name, sets, texts=_texts(folder, "base"), seconds=[found.base["seconds"]],
                 memory_bytes=found.base["memory_bytes"])  # fmt: skip


def entry_of(found: Found, contender: Contender, halves: Sequence[int], folder: Path) -> Entry:
    """One contender with all its seeds."""
    name, seeds = contender.name, range(found.plan.seeds)
    rates = found.chosen[name]
    runs = {seed: [found.final[name, rate, seed] for rate in rates] for seed in seeds}
    shown = [found.final.get((name, found.best[name], seed), runs[seed][0]) for seed in seeds]
    every = [found.final[name, rate, seed] for rate in dict.fromkeys(rates) for seed in seeds]
    cut = sum(run["sets"]["data"]["unfinished"] or 0 for run in shown)
    sets = {"data": replace(_crossed(list(runs.values()), halves), cut=cut)}
    if "forgetting" in found.base["sets"]:
        sets["forgetting"] = _whole(shown, "forgetting")
    memory = [run["memory_bytes"] for run in every if run["memory_bytes"]]
    notes = list(found.notes.get(name, ()))
    if rates[0] != rates[1]:
        notes.append(f"the two halves of the rows chose different rates, {rates[1]:g} and {rates[0]:g}")
    if cut:
        answers = f"{counted(cut, 'answer')} of {counted(len(shown), 'run')} {inflected(cut, 'are')}"
        notes.append(f"{answers} cut off at {counted(shown[0]['max_new_tokens']['data'], 'token')}")
    return Entry(
        name,
        sets,
        overrides=contender.overrides,
        tuning=_tuning(found, name, halves),
        rates=rates,
        best=found.best[name],
        seconds=[run["seconds"] for run in every],
        memory_bytes=max(memory, default=None),
        curve=_mean_curve([run["curve"] for run in shown]),
        validation=_mean_curve([run["validation"] for run in shown]),
        texts=_crossed_texts(folder, name, rates, halves),
        notes=notes,
    )


def _crossed(runs: Sequence[Sequence[Result]], halves: Sequence[int]) -> Scored:
    scores, nll = [], []
    weights = row_scores(runs[0][0])[1]
    for of_halves in runs:
        values = [row_scores(run)[0] for run in of_halves]
        scores.append([values[half][i] for i, half in enumerate(halves)])
        pairs = [run["sets"]["data"]["nll"] for run in of_halves]
        if all(pairs):
            kept = [pairs[half][i] for i, half in enumerate(halves)]
            nll.append(sum(nats for nats, _ in kept) / (sum(tokens for _, tokens in kept) or 1))
    return Scored(scores, weights, nll or None)


def _whole(runs: Sequence[Result], name: str) -> Scored:
    pairs = [run["sets"][name]["nll"] for run in runs]
    nll = [sum(n for n, _ in one) / (sum(t for _, t in one) or 1) for one in pairs if one]
    return Scored([row_scores(run, name)[0] for run in runs], row_scores(runs[0], name)[1], nll or None)


def _tuning(found: Found, name: str, halves: Sequence[int]) -> list[dict[str, Any]]:
    out = []
    for rate, result in sorted(found.tuning.get(name, {}).items()):
        scores, weights = row_scores(result)
        means = []
        for kept in ([0, 1], [0], [1]):
            pairs = [(s * w, w) for s, w, half in zip(scores, weights, halves, strict=True) if half in kept]
            means.append(sum(a for a, _ in pairs) / (sum(b for _, b in pairs) or 1.0))
        out.append({"rate": rate, "level": means[0], "halves": means[1:], "seconds": result["seconds"]})
    return out


def _mean_curve(curves: Sequence[Sequence[Sequence[Any]]]) -> list[list[float | None]]:
    """Point by point, over seeds that have it."""
    by_step: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            if value is not None:
                by_step.setdefault(step, []).append(value)
    return [[step, sum(values) / len(values)] for step, values in sorted(by_step.items())]


def _texts(folder: Path, key: str) -> list[str | None] | None:
    file = texts_file(folder, key)
    known: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return known.get("data")


def _crossed_texts(folder: Path, name: str, rates: Sequence[float], halves: Sequence[int]) -> list[str | None] | None:
    """By the first seed."""
    both = [_texts(folder, Job("final", name, rate, 0).key) for rate in rates]
    if any(texts is None for texts in both):
        return None
    return [both[half][i] for i, half in enumerate(halves)]  # pyright: ignore[reportOptionalSubscript]
