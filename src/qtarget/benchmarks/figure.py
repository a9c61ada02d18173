"""Several regimes side by side: one panel each, every method a line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.benchmarks.seeds import over_seeds
from qtarget.storage.files import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET_COLOUR, BASELINE_COLOUR, REST_COLOUR, CAPTION_COLOUR = "#2a6f97", "#c05621", "#6b7280", "#374151"


def regimes_figure(
    panels: Mapping[str, tuple[Mapping[str, Sequence[float]], float]],
    title: str,
    caption: str,
    *,
    baseline: str = "sft",
    oracle: str | None = None,
) -> Figure:
    """Mean (large point), every seed (small points) and range (line) of each method; the order is the same in all panels.

    Args:
        panels: title -> method -> percent, one number a seed; and percent of the model before training, a dashed line.
        title: the finding.
        caption: what the points and lines are.
    """
    from matplotlib.figure import Figure

    names = list(next(iter(panels.values()))[0])[::-1]
    figure = Figure(figsize=(4.2 * len(panels), 2.3 + 0.4 * len(names)), dpi=190, layout="constrained")
    for axes, (words, (found, untrained)) in zip(
        figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for height, name in enumerate(names):
            colour = {baseline: BASELINE_COLOUR, oracle: REST_COLOUR}.get(name, TARGET_COLOUR)
            draw_line(axes, found[name], height, colour)
        axes.axvline(untrained, color=REST_COLOUR, linestyle="--", linewidth=1)
        axes.set_title(words, loc="left", fontsize=10.5)
        axes.set_xlabel("clean held-out prompts answered exactly (%)", fontsize=9.5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_xlim(-3, 100)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(textwrap.fill(title, 92), x=0.01, ha="left", fontsize=11.5)
    figure.supxlabel(textwrap.fill(caption, 125), fontsize=8.5, color=CAPTION_COLOUR, x=0.01, ha="left")
    return figure


def draw_line(axes: Any, values: Sequence[float], height: int, colour: str) -> None:
    """One method of one panel."""
    summary = over_seeds(values)
    axes.plot([summary.low, summary.high], [height, height], color=colour, linewidth=2, solid_capstyle="round")
    axes.plot(values, [height] * summary.count, "o", color=colour, markersize=4, alpha=0.6)
    axes.plot(summary.mean, height, "o", color=colour, markersize=8)
    axes.annotate(
        f"{summary.mean:.0f}", (summary.high, height), textcoords="offset points", xytext=(8, 0), va="center", fontsize=9,
        color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with writing(path) as file:
        FigureCanvasAgg(figure).print_png(file)
