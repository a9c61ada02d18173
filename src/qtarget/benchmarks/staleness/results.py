"""What the runs of `bench staleness` say: intervals against the row without a region, a table, a sentence, a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qtarget.benchmarks.figure import BASELINE_COLOUR, REST_COLOUR, TARGET_COLOUR
from qtarget.benchmarks.staleness.rules import BASELINE
from qtarget.benchmarks.tables import markdown_table, rounded_interval, with_ends

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Sequence[Mapping[str, Any]]


def point_name(point: Mapping[str, Any]) -> str:
    """A point in words.

    Example:
        >>> point_name({"lag": 4, "epochs": 1, "mismatch": 0.0})
        'lag 4, 1 epoch, mismatch 0'
    """
    return f"lag {point['lag']}, {point['epochs']} epoch{'s' * (point['epochs'] != 1)}, mismatch {point['mismatch']:g}"


def summarize(points: Points, penalties: Points = ()) -> dict[str, Any]:
    """Per point and setting: success in percent with its interval, the paired difference, collapse, KL, share blocked.

    Per point and rule: the same difference with the threshold chosen on other seeds; per age and penalty: success and KL to
    the start.
    """
    rows = []
    for point in points:
        runs, base = point["runs"], point["runs"].get(f"{BASELINE} inf")
        rows.append(
            {
                **{name: point[name] for name in ("lag", "epochs", "mismatch", "learning_rates")},
                "start_percent": round(100 * fmean(run["start"] for run in next(iter(runs.values()))), 1),
                "settings": {name: _setting(found, base) for name, found in runs.items()},
                "rules": {} if base is None else rules_of(runs, base),
            }
        )
    beside = [{"lag": one["lag"], "settings": {n: _penalty(f) for n, f in one["runs"].items()}} for one in penalties]
    return {"points": rows, "penalties": beside, "finding": finding(rows)}


def _setting(found: list[dict[str, float]], base: list[dict[str, float]] | None) -> dict[str, Any]:
    ends = [100 * run["end"] for run in found]
    out: dict[str, Any] = {
        "success_percent": rounded_interval(ends),
        "mean_percent": rounded_interval([100 * run["mean"] for run in found]),
        "collapsed": round(fmean(run["end"] < run["start"] for run in found), 2),
        "kl_k3": round(fmean(run["kl_k3"] for run in found), 5),
        "blocked": round(fmean(run["blocked"] for run in found), 4),
    }
    if base is not None:
        out["to_no_region_points"] = rounded_interval(paired(found, base))
    return out


def _penalty(found: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "success_percent": rounded_interval([100 * run["end"] for run in found]),
        "kl_to_start": rounded_interval([run["kl_to_start"] for run in found]),
    }


def paired(found: Sequence[Mapping[str, float]], base: Sequence[Mapping[str, float]]) -> list[float]:
    """Differences of final success, percentage points, seed by seed.

    Example:
        >>> paired([{"end": 0.75}], [{"end": 0.5}])
        [25.0]
    """
    return [100 * (run["end"] - other["end"]) for run, other in zip(found, base, strict=True)]


def rules_of(runs: Mapping[str, Sequence[Mapping[str, float]]], base: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each rule with the threshold that is best on one half of the seeds, measured on the other half, and the other way round.

    The best of several on the seeds that chose it would be ahead by chance.
    """
    out: dict[str, Any] = {}
    for rule in dict.fromkeys(name.split()[0] for name in runs):
        settings = {name: found for name, found in runs.items() if name.split()[0] == rule}
        if rule == BASELINE or len(base) < 2:
            continue
        gains, chosen = [0.0] * len(base), []
        for half in (0, 1):
            best = max(settings, key=lambda name: fmean(run["end"] for run in settings[name][1 - half :: 2]))
            chosen.append(best.split()[1])
            gains[half::2] = paired(settings[best], base)[half::2]
        out[rule] = {"to_no_region_points": rounded_interval(gains), "thresholds": chosen}
    return out


def finding(rows: Points) -> str:
    """One sentence: where some rule beats the row without a region for certain, and where none does."""
    ahead, none = [], []
    for row in rows:
        if not row["rules"]:
            continue
        best = max(row["rules"], key=lambda name: row["rules"][name]["to_no_region_points"]["mean"])
        gain = row["rules"][best]["to_no_region_points"]
        if gain["low"] > 0:
            ahead.append(f"{best} at {point_name(row)} (+{gain['mean']:.1f} points)")
        else:
            none.append(point_name(row))
    parts = [f"ahead of no region: {'; '.join(ahead)}"] if ahead else []
    parts += [f"nothing is for certain ahead of no region at {'; '.join(none)}"] if none else []
    return ". ".join(part[0].upper() + part[1:] for part in parts)


def rules_table(results: Mapping[str, Any]) -> str:
    """Rules across, points down: the gain over no region, thresholds chosen on other seeds."""
    rows = results["summary"]["points"]
    rules = list(rows[0]["rules"])
    lines = []
    for row in rows:
        base = row["settings"][f"{BASELINE} inf"]["success_percent"]
        gains = [with_ends(row["rules"][rule]["to_no_region_points"], "+.1f", "+.1f") for rule in rules]
        lines.append([point_name(row), f"{row['start_percent']:.1f}", with_ends(base, ends=".1f"), *gains])
    return markdown_table(["point", "start", "no region", *rules], lines)


def penalties_table(results: Mapping[str, Any]) -> str:
    """A line a penalty and weight: success and KL to the start at each age."""
    ages = results["summary"]["penalties"]
    lines = [
        [name, *(c for one in ages for c in (with_ends(one["settings"][name]["success_percent"], ends=".1f"),
                                             with_ends(one["settings"][name]["kl_to_start"], ".2f", ".2f")))]
        for name in ages[0]["settings"]
    ]  # fmt: skip
    head = [c for one in ages for c in (f"success, %, lag {one['lag']}", f"KL to start, lag {one['lag']}")]
    return markdown_table(["penalty and weight", *head], lines)


def drpo_table(results: Mapping[str, Any]) -> str:
    """What `drpo` gains over no region at each of its thresholds, point by point."""
    rows = results["summary"]["points"]
    names = [name for name in rows[0]["settings"] if name.startswith("drpo ")]
    lines = [
        [point_name(row), *(with_ends(row["settings"][n]["to_no_region_points"], "+.1f", "+.1f") for n in names)]
        for row in rows
    ]
    return markdown_table(["point", *names], lines)


def staleness_table(results: Mapping[str, Any]) -> str:
    """A line a setting and point."""
    lines = []
    for row in results["summary"]["points"]:
        for name, s in row["settings"].items():
            gain = s.get("to_no_region_points")
            lines.append(
                [
                    point_name(row),
                    name,
                    f"{row['learning_rates'][name.split()[0]]:g}",
                    with_ends(s["success_percent"]),
                    with_ends(gain, ends=".1f") if gain else "",
                    f"{s['collapsed']:.0%}",
                    f"{s['kl_k3']:.2g}",
                    f"{s['blocked']:.1%}",
                ]
            )
    head = ["point", "rule", "rate", "success, %", "to no region", "below start", "KL to sampler", "blocked"]
    return markdown_table(head, lines)


def staleness_figure(results: Mapping[str, Any]) -> Figure:
    """A panel a point: final success against the KL to the sampler, a point a setting, labelled at each rule's best."""
    from matplotlib.figure import Figure

    rows = results["summary"]["points"]
    columns = min(len(rows), 3)
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(4 * columns, 3.1 * height + 0.8), dpi=110, layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place >= len(rows):
            axes.set_visible(False)
            continue
        row, best = rows[place], {}
        for name, s in row["settings"].items():
            rule, mean = name.split()[0], s["success_percent"]["mean"]
            colour = BASELINE_COLOUR if rule == BASELINE else TARGET_COLOUR
            axes.plot(max(s["kl_k3"], 1e-6), mean, "o", color=colour, markersize=4, alpha=0.7)
            if rule not in best or mean > best[rule][1]:
                best[rule] = (max(s["kl_k3"], 1e-6), mean, name)
        for x, y, name in best.values():
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(3, 3), fontsize=6, color=REST_COLOUR)
        axes.axhline(row["start_percent"], color=REST_COLOUR, linestyle="--", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_title(point_name(row), fontsize=8, loc="left")
        axes.tick_params(labelsize=7)
    figure.supxlabel("mean KL to the sampler (k3, nats a token)", fontsize=8)
    figure.supylabel("exact success at the end (%)", fontsize=8)
    figure.suptitle(textwrap.fill(results["summary"]["finding"][:300], 60 * columns), fontsize=8, x=0.01, ha="left")
    return figure
