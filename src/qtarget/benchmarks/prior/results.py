"""What the runs of `bench prior` say: how much of a flaw each target corrects, with and without guard, and the guard's cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtarget.benchmarks.figure import REST_COLOUR, TARGET_COLOUR
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE, GUARD = "sft", ", guarded"
CORRECTS, LOSES, KEEPS = 0.95, 0.1, 0.8
"""The goals: share of SFT's correction that a guarded target reaches, share of its robustness that it may lose, share of SFT's
accuracy on a right minority's prompts that any target keeps."""
COUNTED = {"none": "accuracy_percent", "minority": "minority_percent"}
"""What is asked at a point; at the others, flaws, the share corrected."""


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Per condition and method: percent corrected and answered, and against SFT; the goals and one sentence."""
    conditions = [
        {
            **{name: condition[name] for name in ("flaw", "dose", "noise_rate")},
            "methods": {name: _row(condition, name) for name in condition["runs"]},
        }
        for condition in results["conditions"]
    ]
    found = {"conditions": conditions, "goals": goals(conditions), "finding": finding(conditions)}
    return found | {"minority": minority(conditions)}


def minority(conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each method's share of SFT's accuracy on a right minority's prompts, and whether that is enough; empty where unasked."""
    rows = next((condition["methods"] for condition in conditions if condition["flaw"] == "minority"), {})
    shares = {name: row["share_of_sft"] for name, row in rows.items() if name != BASELINE}
    return {name: {"keeps": share, "reached": share is not None and share >= KEEPS} for name, share in shares.items()}


def _row(condition: Mapping[str, Any], name: str) -> dict[str, Any]:
    runs, baseline = condition["runs"][name], condition["runs"][BASELINE]
    row: dict[str, Any] = {"accuracy_percent": rounded_interval([run["accuracy_percent"] for run in runs])}
    if condition["flaw"] != "none":
        counted = _counted(condition)
        mine, by_sft = ([run[counted] for run in some] for some in (runs, baseline))
        row |= {
            counted: rounded_interval(mine),
            "share_of_sft": round(sum(mine) / sum(by_sft), 3) if sum(by_sft) else None,
        }
    if _is_flawed(condition):
        row["flawed_percent"] = round(sum(run["flawed_percent"] for run in runs) / len(runs), 1)
    return row


def _is_flawed(condition: Mapping[str, Any]) -> bool:
    return condition["flaw"] not in COUNTED


def goals(conditions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each guarded target: the least share of SFT's correction over flaws and doses, and what the guard costs.

    Whether the goal is ``reached`` is not said where no sound base was run: half of it is about that.
    """
    flawed = [condition for condition in conditions if _is_flawed(condition)]
    sound = {condition["noise_rate"]: condition["methods"] for condition in conditions if condition["flaw"] == "none"}
    out = {}
    for name in conditions[0]["methods"] if conditions else ():
        if not name.endswith(GUARD):
            continue
        plain = name.removesuffix(GUARD)
        out[plain] = {
            "corrects": _least(flawed, name), "corrects_without": _least(flawed, plain),
            "accuracy_change": {
                f"{100 * rate:g} % noise": round(_mean(methods, name) / _mean(methods, plain) - 1, 3)
                for rate, methods in sound.items()
                if _mean(methods, plain)
            },
        }  # fmt: skip
        if sound:
            out[plain]["reached"] = (out[plain]["corrects"] or 0) >= CORRECTS and all(
                change >= -LOSES for change in out[plain]["accuracy_change"].values()
            )
    return out


def _least(flawed: Sequence[Mapping[str, Any]], name: str) -> float | None:
    shares = [condition["methods"][name]["share_of_sft"] for condition in flawed]
    return min((share for share in shares if share is not None), default=None)


def _mean(methods: Mapping[str, Any], name: str) -> float:
    return methods[name]["accuracy_percent"]["mean"]


def finding(conditions: Sequence[Mapping[str, Any]]) -> str:
    """One sentence: the range of corrections over prior-based targets, without and with guard, flaw by flaw."""
    parts = []
    for condition in conditions:
        if _is_flawed(condition):
            shares = {name: row["share_of_sft"] for name, row in condition["methods"].items()}
            guarded = [name for name in shares if name.endswith(GUARD)]
            without, with_guard = (
                _range([shares[name] for name in names if shares[name] is not None])
                for names in ([name.removesuffix(GUARD) for name in guarded], guarded)
            )
            parts.append(f"{condition['flaw']}, {100 * condition['dose']:g} % of its rows: {without} -> {with_guard}")
    return f"Share of SFT's correction, without -> with guard, least to most target: {'; '.join(parts)}"


def _range(shares: Sequence[float]) -> str:
    return f"{100 * min(shares):.0f}..{100 * max(shares):.0f} %" if shares else "none"


def prior_table(results: Mapping[str, Any]) -> str:
    """A line a method: percent of the flawed skill answered right by flaw and dose, then accuracy on a sound base."""
    conditions = results["summary"]["conditions"]
    head = ["method", *(_words(condition) for condition in conditions)]
    lines = [["*untrained*", *(_untrained(results, condition) for condition in conditions)]]
    for name in conditions[0]["methods"]:
        cells = [with_ends(condition["methods"][name][_counted(condition)]) for condition in conditions]
        lines.append([name, *cells])
    return markdown_table(head, lines)


def _words(condition: Mapping[str, Any]) -> str:
    if condition["flaw"] == "minority":
        return f"sound base, {100 * condition['dose']:g} % of the rows in German: answered in German (%)"
    if _is_flawed(condition):
        return f"{condition['flaw']}, {100 * condition['dose']:g} % of its rows: corrected (%)"
    return f"sound base, {100 * condition['noise_rate']:g} % random tokens: accuracy (%)"


def _untrained(results: Mapping[str, Any], condition: Mapping[str, Any]) -> str:
    return f"{results['untrained'][condition['flaw']][_counted(condition)]:.1f}"


def _counted(condition: Mapping[str, Any]) -> str:
    return COUNTED.get(condition["flaw"], "corrected_percent")


def prior_figure(results: Mapping[str, Any]) -> Figure:
    """Percent of the flawed skill answered right, by flaw and dose: hollow without guard, filled with it."""
    from matplotlib.figure import Figure

    conditions = [condition for condition in results["summary"]["conditions"] if _is_flawed(condition)]
    names = [name for name in conditions[0]["methods"] if not name.endswith(GUARD)][::-1]
    figure = Figure(figsize=(4 * len(conditions), 1.8 + 0.4 * len(names)), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    for axes, condition in zip(panels, conditions, strict=True):
        for height, name in enumerate(names):
            for key, filled in ((name, False), (name + GUARD, True)):
                row = condition["methods"].get(key, {}).get("corrected_percent")
                if row is not None:
                    ends = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
                    face = TARGET_COLOUR if filled else "white"
                    style = {"color": TARGET_COLOUR, "markerfacecolor": face, "capsize": 3}
                    axes.errorbar(row["mean"], height - 0.2 * filled, xerr=ends, fmt="o", **style)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{condition['flaw']}, {100 * condition['dose']:g} % of its rows", fontsize=10, loc="left")
        axes.set_xlabel("flawed skill answered right (%)")
        axes.grid(axis="x", color="#e5e7eb")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    figure.suptitle(textwrap.fill(results["summary"]["finding"], 45 * len(conditions)), x=0.01, ha="left", fontsize=11)
    caption = "Hollow: without guard; filled: with it. Lines: 95 % bootstrap intervals over seeds."
    figure.supxlabel(caption, fontsize=8, color=REST_COLOUR, x=0.01, ha="left")
    return figure
