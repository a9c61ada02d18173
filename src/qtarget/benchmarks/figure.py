"""One picture of a comparison over seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtarget.benchmarks.seeds import over_seeds
from qtarget.storage.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_COLOUR, BASELINE_COLOUR, REST_COLOUR = "#2a6f97", "#c05621", "#6b7280"


def comparison_figure(
    accuracies: Mapping[str, Sequence[float]], untrained: float, title: str, caption: str, baseline: str = "sft"
) -> Figure:
    """Mean (large point), every seed (small points) and range (line) of each target; best on top.

    Args:
        accuracies: target -> percent, one number a seed.
        untrained: percent of the model before training, a dashed line.
        title: the finding.
        caption: what the points and lines are.
    """
    from matplotlib.figure import Figure

    names = sorted(accuracies, key=lambda name: over_seeds(accuracies[name]).mean)
    figure = Figure(figsize=(8, 1.9 + 0.42 * len(names)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(names):
        summary = over_seeds(accuracies[name])
        colour = BASELINE_COLOUR if name == baseline else TARGET_COLOUR
        axes.plot([summary.low, summary.high], [height, height], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(accuracies[name], [height] * summary.count, "o", color=colour, markersize=4, alpha=0.6)
        axes.plot(summary.mean, height, "o", color=colour, markersize=9)
        axes.annotate(
            f"{summary.mean:.1f}",
            (summary.mean, height),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=9,
            color=colour,
        )
    axes.axvline(untrained, color=REST_COLOUR, linestyle="--", linewidth=1)
    axes.annotate(
        f"untrained {untrained:.1f}",
        (untrained, 0.02),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, 0),
        fontsize=9,
        color=REST_COLOUR,
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(left=-1)
    axes.set_xlabel("clean held-out prompts answered exactly (%)")
    axes.set_title(textwrap.fill(title, 78), loc="left", fontsize=11)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.supxlabel(textwrap.fill(caption, 105), fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with writing(path) as file:
        FigureCanvasAgg(figure).print_png(file)
