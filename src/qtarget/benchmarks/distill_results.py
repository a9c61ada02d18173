"""What the runs of `bench distill` say: accuracies with intervals, data needed, goals, one sentence, a table, a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qtarget.benchmarks.distill_runs import BASELINE, FULL_LOGITS, METHODS
from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR, TARGET_COLOUR
from qtarget.benchmarks.seeds import Interval, bootstrap_means, percentiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA_GOAL, BYTES_GOAL, POINTS_GOAL = 0.4, 40.0, 1.0
SHOWN = (BASELINE, FULL_LOGITS, "top8_bucket", "draws50", "target_sft_0.3", "reverse_kl")
COLOURS = (BASELINE_COLOUR, TARGET_COLOUR, "#2f855a", "#805ad5", "#b7791f", "#c53030")
CAPTION = (
    "Means over seeds, each with its own rows and order, the same for all methods; intervals are 95 % percentile bootstrap, "
    "paired over methods and fractions, over seeds and test prompts. Over few seeds such intervals are too narrow."
)
Curves = NDArray[np.float64]


def data_needed(fractions: Sequence[float], accuracies: Curves, level: Curves) -> Curves:
    """The smallest fraction at which a curve reaches a level, linear between its points.

    Args:
        accuracies: ``[fractions, ...]``.
        level: ``[...]``.

    Returns:
        ``[...]``; the first fraction where the curve starts at the level or above, infinite where it never gets there.

    Example:
        >>> data_needed([0.1, 0.5, 1.0], np.array([[10.0, 70], [50, 80], [60, 90]]), np.array([30.0, 60]))
        array([0.3, 0.1])
    """
    needed = np.where(accuracies[0] >= level, fractions[0], np.inf)
    for i in range(1, len(fractions)):
        before, after = accuracies[i - 1], accuracies[i]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (level - before) / (after - before)
        crossing = fractions[i - 1] + share * (fractions[i] - fractions[i - 1])
        needed = np.where(np.isinf(needed) & (after >= level), crossing, needed)
    return needed


def summarize(
    methods: Sequence[str],
    fractions: Sequence[float],
    seeds: int,
    answers: Mapping[tuple[str, float, int], str],
    caches: Mapping[str, Mapping[str, float]],
    rates: Mapping[str, float],
    tuned: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Methods, goals and finding of the results.

    Args:
        answers: of each method, fraction and seed "1" for every prompt answered right, else "0".
        caches: name of a cache -> its ``bytes_per_token``.
        rates, tuned: the chosen learning rate, and what each rate reached on validation prompts.
    """
    values = 100.0 * np.array(
        [[[[c == "1" for c in answers[m, f, s]] for s in range(seeds)] for f in fractions] for m in methods]
    )
    means, draws = values.mean((-1, -2)), bootstrap_means(values)  # [methods, fractions], [methods, fractions, draws]
    sft, full = methods.index(BASELINE), methods.index(FULL_LOGITS)
    needed = data_needed(fractions, means.T, means[sft, -1])
    needed_draws = data_needed(fractions, draws.swapaxes(0, 1), draws[sft, -1])
    found = {}
    for i, name in enumerate(methods):
        kind = METHODS[name].cache
        found[name] = {
            "target": METHODS[name].target,
            "hyperparameters": METHODS[name].hyperparameters,
            "cache": kind.name if kind else None,
            "bytes_per_token": caches[kind.name]["bytes_per_token"] if kind else 0.0,
            "learning_rate": rates[name],
            "validation_percent": tuned.get(name, {}),
            "accuracy_percent": [interval(means[i, j], draws[i, j]) for j in range(len(fractions))],
            "to_sft_points": [interval(means[i, j] - means[sft, j], draws[i, j] - draws[sft, j]) for j in range(len(fractions))],
            "to_full_logits_points": interval((means[i] - means[full]).mean(), (draws[i] - draws[full]).mean(0)),
            "data_needed": needed_interval(needed[i], needed_draws[i]),
        }  # fmt: skip
    return {"fractions": list(fractions), "methods": found, "goals": goals(found), "finding": finding(found)}


def interval(mean: float, draws: Curves) -> dict[str, float]:
    """Rounded for the file."""
    return {key: round(value, 3) for key, value in asdict(Interval(float(mean), *percentiles(draws))).items()}


def needed_interval(value: float, draws: Curves) -> dict[str, float | None]:
    """None stands for never; ``reached`` is the share of draws in which the level was."""
    ends = (float(value), *percentiles(draws))
    named: dict[str, float | None] = {
        key: round(end, 3) if np.isfinite(end) else None for key, end in zip(("mean", "low", "high"), ends, strict=True)
    }
    return named | {"reached": round(float(np.isfinite(draws).mean()), 3)}


def goals(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Which methods reach the two goals: on average, and with their whole interval."""
    few = {name: row["data_needed"] for name, row in methods.items() if name != BASELINE}
    small = {
        name: row["to_full_logits_points"]
        for name, row in methods.items()
        if row["target"] == FULL_LOGITS and name != FULL_LOGITS and row["bytes_per_token"] <= BYTES_GOAL
    }
    return {
        "accuracy of sft on all rows with at most 0.4 of them": {
            "reached": [name for name, row in few.items() if (row["mean"] or np.inf) <= DATA_GOAL],
            "reached with the whole interval": [name for name, row in few.items() if (row["high"] or np.inf) <= DATA_GOAL],
        },
        "within 1 point of full logits, over all fractions, at 40 bytes a token or fewer": {
            "reached": [name for name, row in small.items() if row["mean"] >= -POINTS_GOAL],
            "reached with the whole interval": [name for name, row in small.items() if row["low"] >= -POINTS_GOAL],
        },
    }  # fmt: skip


def finding(methods: Mapping[str, Any]) -> str:
    """One sentence about distillation from full logits, and the cheapest cache that is as good."""
    row = methods[FULL_LOGITS]
    level = methods[BASELINE]["accuracy_percent"][-1]["mean"]
    needed = row["data_needed"]
    if needed["mean"] is None:
        first = f"Distillation from full logits never reaches the {level:.1f} % of cross entropy on all rows"
    else:
        first = (
            f"Distillation from full logits reaches the {level:.1f} % of cross entropy on all rows with {needed_words(needed)} "
            "of them"
        )
    small = [
        (row["bytes_per_token"], name)
        for name, row in methods.items()
        if row["target"] == FULL_LOGITS and name != FULL_LOGITS and row["to_full_logits_points"]["mean"] >= -POINTS_GOAL
    ]
    if not small:
        return f"{first}; no smaller cache comes within {POINTS_GOAL:g} point of it"
    size, name = min(small)
    return f"{first}; {name} comes within {POINTS_GOAL:g} point of it at {size:.0f} bytes a token"


def needed_words(needed: Mapping[str, float | None]) -> str:
    """``0.31 (0.25..never)``."""
    mean, low, high = (f"{end:.2f}" if (end := needed[key]) is not None else "never" for key in ("mean", "low", "high"))
    return mean if low == mean == high else f"{mean} ({low}..{high})"


def distill_table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: methods in their order, percent of test prompts answered by fraction of rows."""
    fractions = results["fractions"]
    by_fraction = [f"{fraction:g} of the rows" for fraction in fractions]
    head = ["method", "bytes a token", "learning rate", *by_fraction, "rows needed", "to full logits"]
    lines = [head, ["---"] * len(head)]
    for name, row in results["methods"].items():
        accuracy = [_with_ends(cell) for cell in row["accuracy_percent"]]
        size = f"{row['bytes_per_token']:.1f}" if row["cache"] else "text only"
        to_full = "" if name == FULL_LOGITS else _with_ends(row["to_full_logits_points"], "+.1f")
        lines.append([name, size, f"{row['learning_rate']:g}", *accuracy, needed_words(row["data_needed"]), to_full])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _with_ends(row: Mapping[str, float], form: str = ".1f") -> str:
    return f"{row['mean']:{form}} ({row['low']:{form}}..{row['high']:{form}})"


def distill_figure(results: Mapping[str, Any]) -> Figure:
    """Accuracy against the fraction of rows: a line a main method, its interval as a band, the level of sft dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes, fractions = figure.subplots(), results["fractions"]
    for name, colour in zip(SHOWN, COLOURS, strict=True):
        if name not in results["methods"]:
            continue
        row = results["methods"][name]
        mean, low, high = ([cell[key] for cell in row["accuracy_percent"]] for key in ("mean", "low", "high"))
        size = f"{row['bytes_per_token']:.0f} bytes a token" if row["cache"] else "text only"
        axes.plot(fractions, mean, "o-", color=colour, markersize=4, label=f"{name} ({size})")
        axes.fill_between(fractions, low, high, color=colour, alpha=0.12, linewidth=0)
    level = results["methods"][BASELINE]["accuracy_percent"][-1]["mean"]
    axes.axhline(level, color=REST_COLOUR, linestyle="--", linewidth=1)
    axes.axvline(DATA_GOAL, color=REST_COLOUR, linestyle=":", linewidth=1)
    axes.set_xticks(fractions, [f"{f:g}" for f in fractions])
    axes.set_xlabel(f"fraction of {results['config']['train_rows']} rows of teacher text; equal steps at each")
    axes.set_ylabel("test prompts answered exactly (%)")
    axes.set_title(textwrap.fill(results["finding"], 84), loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.supxlabel(textwrap.fill(CAPTION, 105), fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure
