"""What the runs of `bench distill` say: accuracies with intervals, data needed, goals, one sentence, a table, a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qtarget.benchmarks.distill.runs import BASELINE, FULL_LOGITS, METHODS
from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR, TARGET_COLOUR
from qtarget.benchmarks.seeds import Interval, bootstrap_means, percentiles
from qtarget.benchmarks.tables import markdown_table, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DATA_GOAL, BYTES_GOAL, POINTS_GOAL = 0.4, 40.0, 1.0
SHOWN = {
    BASELINE: BASELINE_COLOUR, FULL_LOGITS: TARGET_COLOUR, "top8_bucket": "#2f855a", "draws50": "#805ad5",
    "target_sft_0.3": "#b7791f", "reverse_kl": "#c53030",
}  # fmt: skip
"""Methods of the figure, and their colours."""
CAPTION = (
    "Means over seeds, each with its own rows and order, the same for all methods; intervals are 95 % percentile bootstrap, "
    "paired over methods and fractions, over seeds and (accuracy) test prompts; over few seeds they are too narrow."
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
        # a flat piece divides by 0; it does not rise to the level, so nothing of it is taken
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (level - before) / (after - before)
        crossing = fractions[i - 1] + share * (fractions[i] - fractions[i - 1])
        needed = np.where(np.isinf(needed) & (after >= level), crossing, needed)
    return needed


def summarize(
    methods: Sequence[str],
    fractions: Sequence[float],
    seeds: int,
    runs: Mapping[tuple[str, float, int], Mapping[str, Any]],
    caches: Mapping[str, Mapping[str, float]],
    rates: Mapping[str, float],
    tuned: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Methods, goals and finding of the results.

    Args:
        runs: of each method, fraction and seed ``answered`` ("1" for every prompt answered right, else "0") and
            ``kl_to_teacher``.
        caches: name of a cache -> its ``bytes_per_token``.
        rates, tuned: the chosen learning rate, and what each rate reached on validation prompts.
    """
    found = {
        name: {
            "target": METHODS[name].target,
            "hyperparameters": METHODS[name].hyperparameters,
            "cache": kind.name if (kind := METHODS[name].cache) else None,
            "bytes_per_token": caches[kind.name]["bytes_per_token"] if kind else 0.0,
            "learning_rate": rates[name],
            "validation_percent": tuned.get(name, {}),
        }
        for name in methods
    }
    every = [[[runs[name, fraction, seed] for seed in range(seeds)] for fraction in fractions] for name in methods]
    right = 100.0 * np.array([[[[c == "1" for c in run["answered"]] for run in row] for row in part] for part in every])
    apart = np.array([[[[run["kl_to_teacher"]] for run in row] for row in part] for part in every])
    for name, row in compared(methods, fractions, right).items():
        found[name] |= {
            "accuracy_percent": row["curve"],
            "to_sft_points": row["to_sft"],
            "to_full_logits_points": row["to_full_logits"],
            "data_needed": row["data_needed"],
        }
    for name, row in compared(methods, fractions, apart, falling=True).items():
        found[name] |= {"kl_to_teacher": row["curve"], "data_needed_for_kl": row["data_needed"]}
    return {"fractions": list(fractions), "methods": found, "goals": goals(found), "finding": finding(found)}


def compared(
    methods: Sequence[str],
    fractions: Sequence[float],
    values: Curves,
    falling: bool = False,
    full: str | None = FULL_LOGITS,
) -> dict[str, dict[str, Any]]:
    """Of each method its curve, its differences to sft and to full logits, and the data that it needs, with intervals.

    Args:
        values: ``[methods, fractions, seeds, prompts]``.
        falling: smaller is better.
        full: the method that has full logits; None where none has, and nothing is compared with it.
    """
    means, draws = values.mean((-1, -2)), bootstrap_means(values)  # [methods, fractions], [methods, fractions, draws]
    sft, best, sign = methods.index(BASELINE), None if full is None else methods.index(full), -1 if falling else 1
    needed = data_needed(fractions, sign * means.T, sign * means[sft, -1])
    needed_draws = data_needed(fractions, sign * draws.swapaxes(0, 1), sign * draws[sft, -1])
    places = range(len(fractions))
    return {
        name: {
            "curve": [interval(means[i, j], draws[i, j]) for j in places],
            "to_sft": [interval(means[i, j] - means[sft, j], draws[i, j] - draws[sft, j]) for j in places],
            "data_needed": needed_interval(needed[i], needed_draws[i]),
        }
        | (
            {}
            if best is None
            else {"to_full_logits": interval((means[i] - means[best]).mean(), (draws[i] - draws[best]).mean(0))}
        )
        for i, name in enumerate(methods)
    }


def interval(mean: float, draws: Curves) -> dict[str, float]:
    """Rounded for the file."""
    return {key: round(value, 4) for key, value in asdict(Interval(float(mean), *percentiles(draws))).items()}


def needed_interval(value: float, draws: Curves) -> dict[str, float | None]:
    """None stands for never; ``reached`` is the share of draws in which the level was."""
    ends = (float(value), *percentiles(draws))
    named: dict[str, float | None] = {
        key: round(end, 3) if np.isfinite(end) else None for key, end in zip(("mean", "low", "high"), ends, strict=True)
    }
    return named | {"reached": round(float(np.isfinite(draws).mean()), 3)}


def goals(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Which methods reach the goals, on average and with their whole interval; sft among them is the control."""
    small = {
        name: row["to_full_logits_points"]
        for name, row in methods.items()
        if row["target"] == FULL_LOGITS and name != FULL_LOGITS and row["bytes_per_token"] <= BYTES_GOAL
    }

    def with_less_data(field: str) -> dict[str, list[str]]:
        found = {name: row[field] for name, row in methods.items()}
        return {
            "reached": [name for name, row in found.items() if (row["mean"] or np.inf) <= DATA_GOAL],
            "reached_with_interval": [name for name, row in found.items() if (row["high"] or np.inf) <= DATA_GOAL],
        }

    return {
        "accuracy_of_sft_with_0.4_of_the_rows": with_less_data("data_needed"),
        "kl_of_sft_with_0.4_of_the_rows": with_less_data("data_needed_for_kl"),
        "within_1_point_of_full_logits_at_40_bytes_a_token": {
            "reached": [name for name, row in small.items() if row["mean"] >= -POINTS_GOAL],
            "reached_with_interval": [name for name, row in small.items() if row["low"] >= -POINTS_GOAL],
        },
    }


def finding(methods: Mapping[str, Any]) -> str:
    """Two sentences: what distillation from full logits needs, and the cheapest cache that is as good."""
    row = methods[FULL_LOGITS]
    level, apart = methods[BASELINE]["accuracy_percent"][-1]["mean"], methods[BASELINE]["kl_to_teacher"][-1]["mean"]
    first = (
        f"Of the rows that cross entropy needs, distillation from full logits needs {needed_words(row['data_needed'])} for "
        f"the same accuracy ({level:.1f} %) and {needed_words(row['data_needed_for_kl'])} to be as near to the teacher "
        f"(KL {apart:.2f})"
    )
    small = [
        (row["bytes_per_token"], name)
        for name, row in methods.items()
        if row["target"] == FULL_LOGITS and name != FULL_LOGITS and row["to_full_logits_points"]["mean"] >= -POINTS_GOAL
    ]
    if not small:
        return f"{first}. No smaller cache comes within {POINTS_GOAL:g} point of full logits"
    size, name = min(small)
    return f"{first}. {name} comes within {POINTS_GOAL:g} point of full logits at {size:.0f} bytes a token"


def needed_words(needed: Mapping[str, float | None]) -> str:
    """As a share of the rows, with its interval.

    Example:
        >>> needed_words({"mean": 0.31, "low": 0.25, "high": None, "reached": 0.9})
        '0.31 (0.25..never)'
    """
    mean, low, high = (f"{end:.2f}" if (end := needed[key]) is not None else "never" for key in ("mean", "low", "high"))
    return mean if low == mean == high else f"{mean} ({low}..{high})"


def distill_table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table: methods in their order, percent of test prompts answered by fraction of rows."""
    shares = [f"{fraction:g} of the rows, %" for fraction in results["fractions"]]
    head = [
        "method", "bytes a token", "learning rate", *shares, "to full logits, points", "rows needed for sft's accuracy",
        "for sft's KL",
    ]  # fmt: skip
    lines = []
    for name, row in results["methods"].items():
        lines.append(
            [
                name,
                f"{row['bytes_per_token']:.1f}" if row["cache"] else "text only",
                f"{row['learning_rate']:g}",
                *(with_ends(cell, ends=".1f") for cell in row["accuracy_percent"]),
                "" if name == FULL_LOGITS else with_ends(row["to_full_logits_points"], "+.1f", "+.1f"),
                needed_words(row["data_needed"]),
                needed_words(row["data_needed_for_kl"]),
            ]
        )
    return markdown_table(head, lines)


def distill_figure(results: Mapping[str, Any]) -> Figure:
    """Accuracy and KL to the teacher against the fraction of rows: a line a main method, its interval as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, results, "accuracy_percent")
    left.set_ylabel("test prompts answered exactly (%)")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    draw_curves(right, results, "kl_to_teacher")
    right.set_ylabel("KL(teacher || student) on the teacher's text (nats)")
    figure.suptitle(textwrap.fill(results["finding"], 120), x=0.01, ha="left", fontsize=11)
    figure.supxlabel(textwrap.fill(CAPTION, 150), fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure


def draw_curves(
    axes: Any, results: Mapping[str, Any], field: str, shown: Mapping[str, str] = SHOWN, text: str = "teacher text"
) -> None:
    """One panel; dashed what cross entropy reaches with all rows, dotted the goal.

    Args:
        shown: methods and their colours; those that were not run are left out.
        text: what the rows are of.
    """
    fractions = results["fractions"]
    for name, colour in shown.items():
        if name not in results["methods"]:
            continue
        row = results["methods"][name]
        mean, low, high = ([cell[key] for cell in row[field]] for key in ("mean", "low", "high"))
        size = f"{row['bytes_per_token']:.0f} bytes a token" if row["cache"] else "text only"
        axes.plot(fractions, mean, "o-", color=colour, markersize=4, label=f"{name} ({size})")
        axes.fill_between(fractions, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.axhline(results["methods"][BASELINE][field][-1]["mean"], color=REST_COLOUR, linestyle="--", linewidth=1)
    axes.axvline(DATA_GOAL, color=REST_COLOUR, linestyle=":", linewidth=1)
    axes.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
    axes.set_xlabel(f"fraction of {results['config']['train_rows']} rows of {text}; equal steps at each")
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
