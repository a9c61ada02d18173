"""Time and memory of the loss as curves, from the raw results of ``qtarget bench sweep``."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR, TARGET_COLOUR
from qtarget.core.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"naive": BASELINE_COLOUR, "floor": REST_COLOUR, "sft": TARGET_COLOUR, "reverse_kl, live teacher": "#7b5ea7"}
OTHERS = ("#4f9d69", "#b08900", "#a23b72", "#5c7c8a", "#89b0ae")
MARKERS = {"naive": "s", "floor": "None", "sft": "o", "reverse_kl, live teacher": "D"}
LABELS = {"naive": "naive cross entropy", "floor": "the three bare products"}


def style(name: str, names: list[str]) -> dict[str, Any]:
    """Colour, marker and legend of one loss, the same in every panel."""
    others = [other for other in names if other not in COLOURS]
    colour = COLOURS.get(name) or OTHERS[others.index(name) % len(OTHERS)]
    return {
        "color": colour,
        "marker": MARKERS.get(name, "."),
        "linestyle": "--" if name == "floor" else "-",
        "label": LABELS.get(name, name),
        "markersize": 5,
        "linewidth": 1.6,
    }


def beyond(point: dict[str, Any]) -> float:
    """MB beyond inputs and gradients; a point below 1 MB (the resolution) is drawn at 1."""
    return max(1.0, point["computed"] if "computed" in point else point["beyond_inputs"] - point["gradients"])


def headline(memory: list[dict[str, Any]]) -> str:
    """What the curves show, in numbers, at the vocabulary with the most tokens."""
    ours = [point for point in memory if point["loss"] != "naive" and "live" not in point["loss"]] or memory
    last = max(ours, key=lambda point: (point["tokens"], point["vocab"]))
    same = [point for point in memory if (point["vocab"], point["width"]) == (last["vocab"], last["width"])]
    ours = [point for point in same if point in ours]
    first, largest = min(point["tokens"] for point in ours), max(map(beyond, ours))
    text = (
        f"From {first:,} to {last['tokens']:,} tokens at V = {last['vocab']:,}, no measured target without a live teacher "
        f"takes more than {largest:,.0f} MB beyond its gradients"
    )
    naive = [point for point in same if point["loss"] == "naive" and point["tokens"] == last["tokens"]]
    if not naive:
        return text
    return (
        f"{text}; naive cross entropy {'would take' if 'computed' in naive[0] else 'takes'} {beyond(naive[0]):,.0f} MB"
    )


def draw_memory(axes: Axes, points: list[dict[str, Any]], along: str, names: list[str]) -> None:
    """One curve a loss; what was computed and not run is hollow."""
    for name in names:
        curve = sorted((p for p in points if p["loss"] == name), key=lambda p: p[along])
        if not curve:
            continue
        look = style(name, names)
        axes.plot([p[along] for p in curve], [beyond(p) for p in curve], **look)
        hollow = [p for p in curve if "computed" in p]
        axes.plot(
            [p[along] for p in hollow],
            [beyond(p) for p in hollow],
            linestyle="None",
            marker=look["marker"],
            markersize=5,
            color=look["color"],
            markerfacecolor="white",
        )
    axes.set_ylabel("MB beyond inputs and gradients")
    finish(axes)


def draw_time(axes: Axes, points: list[dict[str, Any]], names: list[str]) -> None:
    """Seconds of one forward and backward pass, with the lowest and highest round."""
    points = sorted(points, key=lambda p: p["tokens"])
    for name in names:
        if name not in points[0]["rows"]:
            continue
        rows = [p["rows"][name] for p in points]
        middle = [row["median"] for row in rows]
        spread = [
            [row["median"] - min(row["seconds"]) for row in rows],
            [max(row["seconds"]) - row["median"] for row in rows],
        ]
        axes.errorbar([p["tokens"] for p in points], middle, yerr=spread, capsize=2, **style(name, names))
    axes.set_ylabel("CPU or device seconds, forward + backward")
    axes.set_xlabel("supervised tokens N")
    finish(axes)


def finish(axes: Axes) -> None:
    """Both axes logarithmic, a light grid, no frame."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelrotation=35, labelsize=8)


def speed_figure(results: dict[str, Any]) -> Figure:
    """A panel of memory and one of time for each shape, and one of memory against the vocabulary.

    Args:
        results: what ``run_sweep`` wrote.

    Raises:
        DataError: not a single point of memory.
    """
    from matplotlib.figure import Figure

    memory, times, config = results["memory"], results["time"], results["config"]
    if not any(p["loss"] != "naive" for p in memory):
        raise DataError("the results hold no point of memory to draw; run `qtarget bench sweep`")
    names = list(
        dict.fromkeys(["floor", "naive", *(p["loss"] for p in memory), *(n for p in times for n in p["rows"])])
    )
    shapes = [tuple(shape) for shape in config["shapes"] if any(p["vocab"] == shape[0] for p in memory)]
    timed = [shape for shape in shapes if any((p["vocab"], p["width"]) == shape for p in times)]
    across = [p for p in memory if p["width"] == shapes[0][1] and p["tokens"] == config["vocab_tokens"]]
    panels = max(len(shapes) + bool(config["vocabs"]), len(timed))
    figure = Figure(figsize=(4.4 * panels, 4.2 * (1 + bool(timed)) + 0.6), dpi=150, layout="constrained")
    grid = figure.subplots(1 + bool(timed), panels, squeeze=False)
    axes = iter(grid[0])
    for vocab, width in shapes:
        panel = next(axes)
        draw_memory(panel, [p for p in memory if (p["vocab"], p["width"]) == (vocab, width)], "tokens", names)
        panel.set_xlabel("supervised tokens N")
        panel.set_title(f"Memory, V = {vocab:,}, width {width}", fontsize=10)
    if config["vocabs"]:
        panel = next(axes)
        draw_memory(panel, across, "vocab", names)
        panel.set_xlabel("vocabulary V")
        panel.set_title(f"Memory, N = {config['vocab_tokens']:,}, width {shapes[0][1]}", fontsize=10)
    axes = iter(grid[-1])
    for vocab, width in timed:
        panel = next(axes)
        draw_time(panel, [p for p in times if (p["vocab"], p["width"]) == (vocab, width)], names)
        panel.set_title(f"Time, V = {vocab:,}, width {width}", fontsize=10)
    for panel in [panel for panel in figure.axes if not panel.lines]:
        panel.remove()
    handles = {label: handle for a in figure.axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(
        textwrap.fill(
            headline([p for p in memory if p not in across or p["tokens"] in config["memory_tokens"]]), 36 * panels
        ),
        x=0.01,
        ha="left",
        fontsize=11,
    )
    facts = results["machine"]
    note = (
        f"{config['dtype']}, {config['device']}: {facts.get('gpu', facts['processor'])}, {facts['threads']} threads, "
        f"torch {facts['torch']}; hollow: computed, too large to run"
    )
    figure.supxlabel(note, fontsize=7, color=REST_COLOUR, x=0.01, ha="left")
    return figure
