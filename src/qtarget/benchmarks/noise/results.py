"""What the runs of `bench noise` say: the map with intervals, the goals, one sentence, a table, a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR, TARGET_COLOUR
from qtarget.benchmarks.noise.methods import CHOSEN, CROSSFIT, METHODS, OTHERS, PRACTICE
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends
from qtarget.core.errors import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE, OURS = "sft", "consensus"
COLOURS = {
    BASELINE: BASELINE_COLOUR, OURS: TARGET_COLOUR, "target_sft": "#2f855a", "dft": "#805ad5", "prior_surprise": "#c53030",
    "sft_kl": "#b7791f", "crossfit_consensus": "#0e7490",
}  # fmt: skip
CAPTION = (
    "Points: mean over seeds of clean test prompts answered exactly; lines: 95 % percentile bootstrap over seeds (a little "
    "narrow for five). Every method tuned its learning rate and its own hyper-parameter on noisy validation rows."
)
Cells = Sequence[Mapping[str, Any]]


def accuracies(cell: Mapping[str, Any], method: str) -> list[float]:
    """One number a seed."""
    return [run["accuracy_percent"] for run in cell["runs"][method]]


def clean_sft(cells: Cells, base: str) -> list[float] | None:
    """SFT on the rows before any noise, by seed; None where that cell was not run."""
    found = [cell for cell in cells if cell["base"] == base and not cell["rate"]]
    return accuracies(found[0], BASELINE) if found else None


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Per cell and method: accuracy, paired difference to SFT, forgetting, NLL, share of the label pull on noise."""
    cells: Cells = results["cells"]
    summary = [
        {
            **{name: cell[name] for name in ("base", "kind", "rate")},
            "methods": {
                name: {
                    "accuracy_percent": rounded_interval(accuracies(cell, name)),
                    "to_sft_points": rounded_interval(_differences(accuracies(cell, name), accuracies(cell, BASELINE))),
                    "gap_recovered": recovered(cells, cell, name),
                    "kept_percent": _mean(runs, "kept_percent"),
                    "clean_nll": _mean(runs, "nll", 3),
                    "noise_share": _mean(runs, "noise_share", 3),
                }
                for name, runs in cell["runs"].items()
            },
        }
        for cell in cells
    ]
    return {"cells": summary, "goals": goals(summary, results["untrained"]), "finding": finding(summary)}


def recovered(cells: Cells, cell: Mapping[str, Any], method: str) -> float | None:
    """Share of the gap between SFT on noisy and on clean rows that a method closes; None where there is no gap of 5 points."""
    clean = clean_sft(cells, cell["base"])
    if clean is None or not cell["rate"] or cell["kind"] == "cue":
        return None
    noisy, found = (fmean(accuracies(cell, name)) for name in (BASELINE, method))
    best = fmean(clean)
    return round((found - noisy) / (best - noisy), 3) if best - noisy >= 5 else None


def _differences(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    return [value - base for value, base in zip(values, baseline, strict=True)]


def _mean(runs: Sequence[Mapping[str, Any]], name: str, digits: int = 1) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return round(sum(values) / len(values), digits) if values else None


def goals(summary: Cells, untrained: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """At each cell, for our own target: gain over SFT, above the untrained base, gap recovered, points lost on clean rows,
    and the distance to the best published target there."""
    published = [method.name for method in (*CHOSEN, *OTHERS) if method.name != OURS] + [BASELINE]
    out = []
    for cell in summary:
        if OURS not in cell["methods"]:
            continue
        means = {name: row["accuracy_percent"]["mean"] for name, row in cell["methods"].items()}
        best = max((name for name in published if name in means), key=means.__getitem__)
        start = untrained[untrained_key(cell["base"], cell["kind"])]["accuracy_percent"]
        out.append({
            **{name: cell[name] for name in ("base", "kind", "rate")},
            "ours": means[OURS], "sft": means[BASELINE], "untrained": round(start, 2),
            "best_published": best, "best_published_percent": means[best],
            "relative_gain": round(means[OURS] / means[BASELINE] - 1, 3) if means[BASELINE] else None,
            "gap_recovered": cell["methods"][OURS]["gap_recovered"],
            "within_a_point_of_best": means[OURS] >= means[best] - 1,
        })  # fmt: skip
    return out


def finding(summary: Cells) -> str:
    """One sentence on the map: which target is never far below SFT under noise, and what the newsletter's rule does there."""
    noisy = [cell for cell in summary if cell["rate"]]
    names = [method.name for method in (*CHOSEN, *CROSSFIT) if all(method.name in cell["methods"] for cell in noisy)]

    def below(name: str) -> float:
        return -min(cell["methods"][name]["to_sft_points"]["mean"] for cell in noisy)

    if not noisy or not names:
        return "No noisy point of the map was run"
    best, *others = sorted(names, key=below)
    first = "is never below SFT" if below(best) <= 0 else f"is at most {below(best):.1f} points below SFT"
    parts = [f"Over {counted(len(noisy), 'noisy point')} of the map, {best} {first}"]
    parts += [f"the next best target, {others[0]}, up to {max(0.0, below(others[0])):.1f} points"] if others else []
    parts += [f"1 - p_base up to {max(0.0, below('prior_surprise')):.1f}"] if "prior_surprise" in names else []
    return "; ".join(parts)


ORACLES = {method.name for method in PRACTICE if method.rows in ("marked", "marked rows")}
"""What nobody has outside a benchmark: they know the marks."""

FILTERED = "sft, filtered rows"
"""An old practice, and the strongest: no target at all."""


def best_of(cell: Mapping[str, Any]) -> str:
    """The best method of one point of the map that knows no marks."""
    means = {name: row["accuracy_percent"]["mean"] for name, row in cell["methods"].items() if name not in ORACLES}
    return max(means, key=means.__getitem__)


def noise_table(results: Mapping[str, Any]) -> str:
    """Accuracies as a Markdown table: a line a method, a column a point of the map; the best target of a column is bold."""
    cells = results["summary"]["cells"]
    names = [name for name in METHODS if any(name in cell["methods"] for cell in cells)]
    head = ["method", *(f"{cell['base']}: {words(cell)}" for cell in cells)]
    untrained = [f"{_untrained(results, cell):.1f}" for cell in cells]
    lines = [["*untrained*", *untrained]]
    for name in names:
        line = [f"*{name}*" if name in ORACLES else name]
        for cell in cells:
            row = cell["methods"].get(name)
            best = cell["methods"][best_of(cell)]["accuracy_percent"]["mean"]
            line.append("" if row is None else _cell(row["accuracy_percent"], name not in ORACLES, best))
        lines.append(line)
    return markdown_table(head, lines)


def words(cell: Mapping[str, Any]) -> str:
    """``40 % random tokens``."""
    return f"{100 * cell['rate']:g} % {cell['kind'].replace('_', ' ')}" if cell["rate"] else "clean"


def _untrained(results: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    return results["untrained"][untrained_key(cell["base"], cell["kind"])]["accuracy_percent"]


def untrained_key(base: str, kind: str) -> str:
    """Under which a base's own answers stand: those to misleading cues apart."""
    return f"{base}, cue" if kind == "cue" else base


def _cell(row: Mapping[str, float], real: bool, best: float) -> str:
    text = with_ends(row)
    return f"**{text}**" if real and row["mean"] == best else text


def share_table(results: Mapping[str, Any]) -> str:
    """Where the label pull goes, what is forgotten, and the NLL of clean rows, at the noisiest random-token points."""
    cells = [cell for cell in results["summary"]["cells"] if cell["kind"] == "random_tokens" and cell["rate"] == 0.4]
    head, lines = (
        ["base", "method", "label pull spent on noise", "other skills kept (%)", "NLL of clean rows (nats)"],
        [],
    )
    for cell in cells:
        for name, row in cell["methods"].items():
            numbers = [row["noise_share"], row["kept_percent"], row["clean_nll"]]
            lines.append([cell["base"], name, *("" if value is None else f"{value:g}" for value in numbers)])
    return markdown_table(head, lines)


def noise_figure(results: Mapping[str, Any]) -> Figure:
    """The map of random tokens: accuracy against rate, a panel a base."""
    from matplotlib.figure import Figure

    cells = [cell for cell in results["summary"]["cells"] if cell["kind"] == "random_tokens"]
    bases = list(dict.fromkeys(cell["base"] for cell in sorted(cells, key=lambda cell: _untrained(results, cell))))
    figure = Figure(figsize=(4 * len(bases), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
    for axes, base in zip(panels, bases, strict=True):
        mine = sorted((cell for cell in cells if cell["base"] == base), key=lambda cell: cell["rate"])
        for name, colour in COLOURS.items():
            points = [
                (cell["rate"], cell["methods"][name]["accuracy_percent"]) for cell in mine if name in cell["methods"]
            ]
            if points:
                rates, rows = zip(*points, strict=True)
                means = [row["mean"] for row in rows]
                ends = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
                axes.errorbar(rates, means, ends, fmt="o-", color=colour, label=name, capsize=3, markersize=4)
        axes.axhline(_untrained(results, mine[0]), color=REST_COLOUR, linestyle="--", linewidth=1, label="untrained")
        axes.set_title(f"base knows {base} of the format", fontsize=10, loc="left")
        axes.set_xlabel("share of response tokens that are random")
        axes.grid(color="#e5e7eb")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("clean test prompts answered exactly (%)")
    panels[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(textwrap.fill(results["summary"]["finding"], 150), x=0.01, ha="left", fontsize=11)
    figure.supxlabel(textwrap.fill(CAPTION, 150), fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure
