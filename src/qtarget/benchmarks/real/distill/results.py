"""What students of the real model say: how near to the teacher, by fraction of the rows, against cross entropy on all of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qtarget.benchmarks.distill.results import DATA_GOAL, compared, draw_curves
from qtarget.benchmarks.distill.runs import BASELINE
from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR
from qtarget.benchmarks.real.distill.config import TEACHER, UNTRAINED
from qtarget.benchmarks.real.following import HEADS, ended_cell, followed_cells, gained_cell
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = {"kl_to_teacher": "KL", "nll": "NLL"}
NOTE = (
    "Nats a token, means over held-out rows; 95 % intervals are a paired bootstrap over those rows. One seed: how far another "
    "draw of rows, or another order, would be off is not in them."
)
COLOURS = ("#2563eb", "#2f855a", "#805ad5", "#b7791f", "#c53030", "#0e7490")


def summarize(results: Mapping[str, Any], caches: Mapping[str, str]) -> dict[str, Any]:
    """Curves and differences of each point, and the finding.

    Args:
        caches: contender -> the cache that it reads, or nothing.
    """
    points = [summarize_point(point, results["config"], results["teacher"], caches) for point in results["points"]]
    return {"points": points, "finding": ". ".join(finding(point) for point in points)}


def summarize_point(
    point: Mapping[str, Any], config: Mapping[str, Any], teacher: Mapping[str, Any], caches: Mapping[str, str]
) -> dict[str, Any]:
    """Of each contender its curves, the data it needs, and how far it is with the goal's fraction from sft with all rows."""
    names, fractions, sizes = list(caches), list(config["fractions"]), teacher[point["text"]]["caches"]
    methods: dict[str, dict[str, Any]] = {
        name: {
            "cache": cache or None,
            "bytes_per_token": sizes[cache]["bytes_per_token"] if cache else 0.0,
            "learning_rate": point["rates"][name],
        }
        for name, cache in caches.items()
    }
    at = fractions.index(min(fractions, key=lambda fraction: abs(fraction - DATA_GOAL)))
    for measure in MEASURES:
        # [methods, fractions, one seed, rows]
        values = np.array([[[point["runs"][f"{n}|{f:g}"][measure]] for f in fractions] for n in names])
        sft = values[names.index(BASELINE), -1]
        found = compared(names, fractions, values, falling=True, full=None)
        for name, of in zip(names, values, strict=True):
            methods[name] |= {
                measure: found[name]["curve"],
                f"{measure}_to_sft": found[name]["to_sft"],
                f"{measure}_data_needed": found[name]["data_needed"],
                f"{measure}_to_sft_on_all_rows": rounded_interval(of[at] - sft, 4),
            }
    untrained = {measure: round(float(np.mean(point["untrained"][measure])), 4) for measure in MEASURES}
    return {
        "student": point["student"], "text": point["text"], "fractions": fractions, "decided_at": fractions[at],
        "untrained": untrained, "teacher_nll": round(float(np.mean(point["untrained"]["teacher_nll"])), 4),
        "methods": methods, "config": {"train_rows": config["train_rows"]},
    }  # fmt: skip


def verdict(apart: Mapping[str, float]) -> str:
    """Where an interval of a difference lies.

    Example:
        >>> verdict({"mean": -1.0, "low": -2.0, "high": 0.1})
        'not told apart'
    """
    return "below" if apart["high"] < 0 else "above" if apart["low"] > 0 else "not told apart"


def finding(point: Mapping[str, Any]) -> str:
    """One sentence a point: which contenders are with the goal's fraction at least where sft is with all rows."""
    parts = []
    for measure, word in MEASURES.items():
        names: dict[str, list[str]] = {}
        for name, row in point["methods"].items():
            names.setdefault(verdict(row[f"{measure}_to_sft_on_all_rows"]), []).append(name)
        parts.append(f"{word} " + ", ".join(f"{sided}: {' and '.join(found)}" for sided, found in names.items()))
    where = f"{point['student']} student, {point['text']}, {point['decided_at']:g} of the rows against sft on all"
    return f"{where}: {'; '.join(parts)}"


def real_distill_table(results: Mapping[str, Any]) -> str:
    """A table a point, each under its name."""
    parts = []
    for point in results["summary"]["points"]:
        fractions = point["fractions"]
        size = results["teacher"]["students"][point["student"]] / 1e6
        decided = f"{point['decided_at']:g} of the rows, to sft on all"
        head = [
            "contender", "bytes a token", *(f"{word}, {f:g} of the rows" for word in MEASURES.values() for f in fractions),
            *(f"{word}, {decided}" for word in MEASURES.values()),
        ]  # fmt: skip
        blank = ["" for _ in fractions[1:]]
        told = [cell for m in MEASURES for cell in (f"{point['untrained'][m]:.2f}", *blank)]
        lines = [["*untrained*", "", *told, "", ""], *(line_of(name, row) for name, row in point["methods"].items())]
        title = (
            f"**{point['student']} student ({size:.0f} million parameters), {point['text']}** "
            f"(the teacher's NLL: {point['teacher_nll']:.2f})"
        )
        parts.append(f"{title}\n\n{markdown_table(head, lines)}")
    parts += [following_table(results, point) for point in results["points"] if "instructions" in point["untrained"]]
    return "\n".join(parts)


def following_table(results: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    """What students of one point follow of the instructions that a program can check, and the teacher, in percent."""
    asked, sft = results["asked"], point["runs"][f"{BASELINE}|{max(results['config']['fractions']):g}"]
    lines = []
    for name, run in {**{name: point[name] for name in (TEACHER, UNTRAINED)}, **point["runs"]}.items():
        method, _, fraction = name.partition("|")
        found = [run["instructions"]]
        told = "" if run is sft else gained_cell(found, [sft["instructions"]])
        lines.append(
            [method if fraction else f"*{method}*", fraction, *followed_cells(found, asked), told, ended_cell(found)]
        )
    head = ["contender", "of the rows", *HEADS, f"{HEADS[0]}, to sft on all", "ended"]
    cut = results["config"]["answer_tokens"]
    said = f"{point['student']} student, {point['text']}: instructions that a program can check (IFEval)"
    return f"{said}, {len(asked)} prompts, answers cut at {cut} tokens\n\n{markdown_table(head, lines)}"


def line_of(name: str, row: Mapping[str, Any]) -> list[str]:
    """A contender's line: its curves, and how far it is from sft on all rows."""
    return [
        name,
        f"{row['bytes_per_token']:.0f}" if row["cache"] else "text only",
        *(f"{cell['mean']:.2f}" for measure in MEASURES for cell in row[measure]),
        *(with_ends(row[f"{measure}_to_sft_on_all_rows"], "+.2f", "+.2f") for measure in MEASURES),
    ]


def real_distill_figure(results: Mapping[str, Any]) -> Figure:
    """A row a point: KL and NLL against the fraction of rows, a line a contender, its interval as a band."""
    from matplotlib.figure import Figure

    points = results["summary"]["points"]
    figure = Figure(figsize=(11, 4.2 * len(points)), dpi=110, layout="constrained")
    for row, point in zip(figure.subplots(len(points), 2, squeeze=False), points, strict=True):
        colours = dict(zip(point["methods"], (BASELINE_COLOUR, *COLOURS), strict=False))
        for axes, (measure, word) in zip(row, MEASURES.items(), strict=True):
            draw_curves(axes, point, measure, colours, "the text")
            axes.set_ylabel(f"{word} on held-out rows (nats a token)")
        row[0].set_title(f"{point['student']} student, {point['text']}", loc="left", fontsize=10)
        row[0].legend(frameon=False, fontsize=8)
    figure.supxlabel(textwrap.fill(NOTE, 150), fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure
