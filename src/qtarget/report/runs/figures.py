"""The pictures of a comparison, drawn from its JSON alone: for slides, and inside the page."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.report.heatmap import shown
from qtarget.report.runs.document import common_evaluation, known
from qtarget.storage.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
"""Okabe and Ito's, without yellow, which white ground swallows."""
STYLES = ("-", "--", ":", "-.")
GREY = "#6b7280"
BARS = 10  # gains and losses drawn, each
LABELS = {
    "nll": "nll, nats a token",
    "loss": "objective, its own unit",
    "label_weight": "mean label weight a",
    "effective_sample_size": "effective sample size, share of tokens",
    "reward": "reward of samples",
    "kl/start": "KL to the start, nats a token",
    "divergence/kl_k3": "KL to the sampler, nats a token (k3)",
    "ratio/ess": "effective sample size of ratios, share",
    "region/blocked_positive": "blocked, share of tokens with A > 0",
    "region/blocked_negative": "blocked, share of tokens with A < 0",
    "entropy": "entropy, nats a token",
    "rollout/age": "age of samples, optimizer steps",
}
SAMPLING = tuple(LABELS)[4:]
"""What a run on its own samples logs, in the order of its panels."""
ACROSS = 4  # panels in a line
ROUNDING = 1e-6  # a curve that moves less is drawn flat


FIGURES = ("evaluation_nll", "training", "weights", "samples", "held_out_reward", "reward_against_kl", "tokens-*")
"""Names of all figures that there can be."""


def comparison_figures(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Name -> figure; those without a single value are left out."""
    runs = report["runs"]
    name = common_evaluation(runs) or next((n for run in runs for n in run["evaluations"]), None)
    figures: dict[str, Figure | None] = {}
    if name is not None:
        held_out = [(run["name"], run["evaluations"].get(name, {})) for run in runs]
        figures["evaluation_nll"] = _curves(held_out, ("nll",), report["finding"])
    training = [(run["name"], run["train"]) for run in runs]
    figures["training"] = _curves(training, ("nll", "loss"), training_title(runs))
    figures["weights"] = _curves(training, ("label_weight", "effective_sample_size"), weights_title(runs))
    sampling = [(run["name"], run["train"]) for run in runs if "rollout/age" in run["train"]]
    figures["samples"] = _curves(sampling, SAMPLING, samples_title(runs))
    held_out_rewards = [(f"{run['name']}, {rows}", curve) for run in runs for rows, curve in run["evaluations"].items()]
    figures["held_out_reward"] = _curves(held_out_rewards, ("reward",), "Reward of samples for held-out prompts")
    figures["reward_against_kl"] = against_kl(runs)
    for change in report["tokens"]:
        figures[f"tokens-{_file_name(change['run'], change['rows_of'])}"] = token_figure(change)
    return {key: figure for key, figure in figures.items() if figure is not None}


def training_title(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the training curves show, as a sentence."""
    ends = [(run["name"], values[-1]) for run in runs if (values := known(run["train"], "nll"))]
    if not ends:
        return "Training: no plain nll was logged"
    said = ", ".join(f"{name} ends at {value:.3f}" for name, value in ends)
    return f"Training rows, plain nll with the noise in it, nats a token: {said}"


def moved(values: Sequence[float], digits: str) -> str:
    """From the first to the last value; one line tells of no change.

    Example:
        >>> moved([0.5, 0.25], ".2g"), moved([0.5], ".2g")
        ('0.5 to 0.25', '0.5 (one line logged)')
    """
    if len(values) == 1:
        return f"{values[0]:{digits}} (one line logged)"
    return f"{values[0]:{digits}} to {values[-1]:{digits}}"


def weights_title(runs: Sequence[Mapping[str, Any]]) -> str:
    """What the weights did from the first to the last logged line."""
    parts = []
    for run in runs:
        values = known(run["train"], "label_weight")
        if values:
            parts.append(f"{run['name']} {moved(values, '.2g')}")
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"Mean pull to the observed token, first to last line: {', '.join(parts[:4])}{more}"


def samples_title(runs: Sequence[Mapping[str, Any]]) -> str:
    """What became of reward and entropy from the first to the last logged line of the runs on samples."""
    parts = []
    for run in runs:
        if "rollout/age" in run["train"]:
            ends = [
                f"{metric} {moved(values, '.3g')}"
                for metric in ("reward", "entropy")
                if (values := known(run["train"], metric))
            ]
            parts.append(" ".join([run["name"], " and ".join(ends)]))
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"Samples, first to last line: {', '.join(parts[:4])}{more}"


def kl_of(run: Mapping[str, Any]) -> tuple[str, list[float | None]] | None:
    """From what a run's KL was taken, and the KL of each training line; None where it never left 0.

    TRL's own trainer logs ``kl``, to the model that it started from, where ``beta`` is set; ours logs ``kl/start`` where the start
    is at hand, and always that to the sampler.
    """
    for start, metric in (("start", "kl/start"), ("start", "kl"), ("sampler", "divergence/kl_k3")):
        if any(value > ROUNDING for value in known(run["train"], metric)):
            return start, run["train"][metric]
    return None


def at_steps(steps: Sequence[int], train: Mapping[str, Any], values: Sequence[float | None]) -> list[float | None]:
    """The value of the last training line at or before each step; None where there is none.

    Example:
        >>> at_steps([0, 3], {"step": [2, 4]}, [0.1, 0.2])
        [None, 0.1]
    """
    pairs = list(zip(train["step"], values, strict=True))
    return [next((value for other, value in reversed(pairs) if other <= step), None) for step in steps]


def against_kl(runs: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Reward, one panel of samples and one a held-out set, against KL; lines go from step to step, the last is ringed.

    Runs whose KL never left 0 (samples used once) are left out.
    """
    panels: dict[tuple[str, str], list[tuple[str, list[tuple[float, float]]]]] = {}
    for run in runs:
        if (found := kl_of(run)) is None:
            continue
        start, moved = found
        curves = {"samples": run["train"]} | {f"held-out prompts, {k}": v for k, v in run["evaluations"].items()}
        for what, curve in curves.items():
            kl = at_steps(curve["step"], run["train"], moved)
            pairs = zip(kl, curve.get("reward", []), strict=False)
            if points := [(x, y) for x, y in pairs if x is not None and y is not None]:
                panels.setdefault((what, start), []).append((run["name"], points))
    return _paths(panels, [run["name"] for run in runs]) if panels else None


def _paths(
    panels: Mapping[tuple[str, str], Sequence[tuple[str, list[tuple[float, float]]]]], names: list[str]
) -> Figure:
    figure, places = panelled(len(panels))
    for axes, ((what, start), paths) in zip(places, panels.items(), strict=True):
        for name, points in paths:
            style = line_style(names.index(name))
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=4, alpha=0.7, **style)
            axes.plot(*points[-1], "o", markersize=10, fillstyle="none", color=style["color"])
        axes.set_xlabel(f"KL to the {start}, nats a token")
        axes.set_ylabel(f"reward of {what}")
        tidy(axes)
    finish(figure, "Reward against KL; lines go from step to step, the last is ringed")
    return figure


def panelled(count: int) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many panels, at most ``ACROSS`` beside each other, with room for one legend."""
    from matplotlib.figure import Figure

    across = min(ACROSS, count)
    down = -(-count // across)
    figure = Figure(figsize=(5.2 * across + 3.2, 4.4 * down), dpi=120, layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[count:]:
        axes.remove()
    return figure, list(places[:count])


def line_style(place: int) -> dict[str, str]:
    """Colour and dashes of the run at this place, the same in every panel of a figure."""
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": STYLES[place // len(COLOURS) % len(STYLES)]}


def tidy(axes: Axes) -> None:
    """A grid behind, and no box."""
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, title: str) -> None:
    """One legend for all panels, and the title."""
    across = min(ACROSS, len(figure.axes))
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), [literal(n) for n in handles], loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(literal(textwrap.fill(title, 46 * across + 34)), x=0.01, ha="left", fontsize=11)


def _curves(series: Sequence[tuple[str, Mapping[str, Any]]], metrics: Sequence[str], title: str) -> Figure | None:
    shown_metrics = [metric for metric in metrics if any(known(curve, metric) for _, curve in series)]
    if not shown_metrics:
        return None
    figure, places = panelled(len(shown_metrics))
    for axes, metric in zip(places, shown_metrics, strict=True):
        for i, (name, curve) in enumerate(series):
            points = [
                (s, v) for s, v in zip(curve.get("step", []), curve.get(metric, []), strict=False) if v is not None
            ]
            if points:
                marker = "o" if len(points) <= 30 else None
                axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, **line_style(i))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(LABELS[metric])
        low, high = axes.get_ylim()
        if high - low < ROUNDING:
            axes.set_ylim(low - ROUNDING, high + ROUNDING)
        tidy(axes)
    finish(figure, title)
    return figure


def token_figure(change: Mapping[str, Any]) -> Figure:
    """Bars of the largest gains and losses in log-prob between the two steps."""
    from matplotlib.figure import Figure

    bars = [*change["gains"][:BARS], *reversed(change["losses"][:BARS])]
    figure = Figure(figsize=(9, 1.8 + 0.3 * max(1, len(bars))), dpi=120, layout="constrained")
    axes = figure.subplots()
    for height, one in enumerate(reversed(bars)):
        axes.barh(height, one["change"], color=COLOURS[0] if one["change"] > 0 else COLOURS[1])
    names = [literal(f"{shown(one['context'])[-24:]} → {shown(one['token'])}") for one in reversed(bars)]
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlabel("change of the token's log-prob, nats (right of the arrow: the token)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    title = (
        f"{change['run']}, {change['rows_of']} rows, step {change['from_step']} to {change['to_step']}: nll "
        f"{change['nll_before']:.3f} to {change['nll_after']:.3f} over {change['token_count']:,} tokens; "
        "largest gains and losses"
    )
    figure.suptitle(literal(textwrap.fill(title, 100)), x=0.01, ha="left", fontsize=10)
    return figure


def literal(text: str) -> str:
    """Text that matplotlib takes as it is: dollars would start a formula, and a leading underscore hides a label."""
    return ("\u200a" + text if text.startswith("_") else text).replace("$", r"\$")


def _file_name(*parts: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)


def png_bytes(figure: Figure, made_by: str = "qtarget") -> bytes:
    """A PNG without a display; it says who made it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Source": made_by})
    return buffer.getvalue()


def write_pngs(report: Mapping[str, Any], folder: Path, made_by: str = "qtarget") -> list[Path]:
    """One file a figure; their paths."""
    paths = []
    for name, figure in comparison_figures(report).items():
        paths.append(folder / f"{name}.png")
        write_atomic(paths[-1], png_bytes(figure, made_by))
    return paths


def runs_page(report: Mapping[str, Any]) -> str:
    """The comparison as one HTML document."""
    from qtarget.report.page import render_page

    figures = {k: f for k, f in comparison_figures(report).items() if not k.startswith("tokens-")}
    pictures = [
        {"uri": "data:image/png;base64," + base64.b64encode(png_bytes(figure)).decode(), "name": name.replace("_", " ")}
        for name, figure in figures.items()
    ]
    names = ", ".join(run["name"] for run in report["runs"][:4])
    more = f" and {len(report['runs']) - 4} more" if len(report["runs"]) > 4 else ""
    return render_page(
        "runs.html",
        report,
        title=f"Runs: {names}{more}",
        styles=("runs.css", "rollouts.css"),
        scripts=("rollouts.js", "runs.js"),
        finding=report["finding"],
        pictures=pictures,
    )
