"""What the runs of `bench noise --base smollm2` say, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qtarget.benchmarks.noise.results import ORACLES, words
from qtarget.benchmarks.tables import markdown_table, with_ends

COLUMNS = {
    "nll": "NLL of clean rows",
    "wikitext_nll": "NLL of WikiText",
    "dolly_nll": "NLL of human answers",
    "noise_share": "pull on noise",
}
"""Beside what was completed; those that were not measured are left out."""


def real_table(results: Mapping[str, Any]) -> str:
    """A table a point of the map, each under its name: what was completed, and what it cost elsewhere.

    Intervals are given from three seeds; with fewer there is nothing to resample.
    """
    first, *_ = results["untrained"].values()
    shown = [name for name in COLUMNS if name in first or name == "noise_share"]
    parts = []
    for cell, summary in zip(results["cells"], results["summary"]["cells"], strict=True):
        lines = [["*untrained*", f"{first['accuracy_percent']:.1f}", "", *(_number(first.get(name)) for name in shown)]]
        for name, runs in cell["runs"].items():
            row = summary["methods"][name]
            lines.append([
                f"*{name}*" if name in ORACLES else name,
                _percent(row["accuracy_percent"], len(runs)),
                "" if name == "sft" else _percent(row["to_sft_points"], len(runs), "+.1f"),
                *(_number(_mean(runs, column)) for column in shown),
            ])  # fmt: skip
        head = ["method", "completed (%)", "to sft (points)", *(COLUMNS[name] for name in shown)]
        parts.append(f"**{words(cell)}**\n\n{markdown_table(head, lines)}")
    return "\n".join(parts)


def _percent(row: Mapping[str, float], seeds: int, form: str = ".1f") -> str:
    return with_ends(row, form) if seeds > 2 else f"{row['mean']:{form}}"


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return fmean(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
