"""The lens document as an HTML page, and as small figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.report.page import render_page
from qtarget.storage.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#59616e",
)  # Okabe and Ito: apart for colour-blind people too
COLUMNS = 5
NAME_MAX = 26  # characters over one panel


def lens_page(document: dict[str, Any]) -> str:
    """One self-contained page that shows what the document holds, and nothing else."""
    names = ", ".join(loss["name"] for loss in document["losses"][:4])
    more = len(document["losses"]) - 4
    title = f"What these losses teach: {names}" + (f" and {more} more" if more > 0 else "")
    return render_page("lens.html", document, title=title, styles=("lens.css",), scripts=("lens.js",))


def lens_figure(document: dict[str, Any]) -> Figure:
    """One panel a loss: the updates of the observed token and of others against ``p_y``; all panels on one scale."""
    from matplotlib.figure import Figure

    losses = document["losses"]
    columns = min(COLUMNS, len(losses))
    rows = -(-len(losses) // columns)
    figure = Figure(figsize=(2.5 * columns + 0.4, 1.95 * rows + 0.9), dpi=100, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place < len(losses):
            _panel(axes, losses[place])
        else:
            axes.set_visible(False)
        if place + columns >= len(losses):
            axes.tick_params(labelbottom=True)
    axes = panels.flat[0]
    axes.set_ylim(-1.3, 1.3)
    handles, labels = max((a.get_legend_handles_labels() for a in panels.flat), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel("p_y, the model's probability of the observed token", fontsize=9)
    figure.supylabel("update of the logit (minus gradient)", fontsize=9)
    return figure


def _panel(axes: Axes, loss: dict[str, Any]) -> None:
    shown, form = loss["curves"], loss["form"]
    axes.axhline(0, color=GREY, linewidth=0.6)
    lines = [("observed", "observed token", BLUE, "-"), ("live_favourite", "model's favourite other", ORANGE, "--")]
    if loss["frozen"]:
        lines.append(("frozen_favourite", "frozen model's favourite", GREEN, ":"))
    for key, label, colour, style in lines:
        axes.plot(shown["p_y"], shown[key], color=colour, linestyle=style, linewidth=1.6, label=label)
    name = loss["name"] if len(loss["name"]) <= NAME_MAX else "..." + loss["name"][-NAME_MAX:]
    axes.set_title(name, fontsize=9, loc="left", fontweight="bold")
    words = "not of the (a, b, q) form"
    if form["fits"]:
        words = f"a = {form['a']['name'] or 'see JSON'}"
        words += f"\nb = {form['b']['name'] or 'see JSON'}" if form["q"] else ""
    axes.text(0.98, 0.03, words, transform=axes.transAxes, ha="right", va="bottom", fontsize=6.5, color=GREY)
    axes.tick_params(labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure: Figure, path: Path, made_by: str = "qtarget") -> None:
    """Write a PNG without a display; it says who made it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with writing(path) as file:
        FigureCanvasAgg(figure).print_png(file, metadata={"Source": made_by})
