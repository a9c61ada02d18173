"""What was measured with the real model, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qtarget.benchmarks.noise.results import BASELINE, ORACLES, words
from qtarget.benchmarks.real.demonstrations import WRITTEN
from qtarget.benchmarks.real.distill.results import real_distill_table
from qtarget.benchmarks.real.following import HEADS, ended_cell, followed_cells, gained_cell
from qtarget.benchmarks.tables import markdown_table, with_ends

COLUMNS = {
    "nll": "NLL of clean rows",
    "wikitext_nll": "NLL of WikiText",
    "dolly_nll": "NLL of human answers",
    "noise_share": "pull on noise",
}
"""Beside what was completed; those that were not measured are left out."""
NOT_MEASURED = "Not measured without `--data`: forgetting, and instruction following (IFEval).\n"


def real_table(results: Mapping[str, Any]) -> str:
    """A table a point of the map, each under its name: what was completed, and what it cost elsewhere.

    Intervals are given from three seeds; with fewer there is nothing to resample.
    """
    first, *_ = results["untrained"].values()
    shown = [name for name in COLUMNS if name in first or name == "noise_share"]
    parts = []
    for cell, summary in zip(results["cells"], results["summary"]["cells"], strict=True):
        lines = [["*untrained*", f"{first['accuracy_percent']:.1f}", "", *(_number(first.get(name)) for name in shown)]]
        for name, runs in cell["runs"].items():
            row = summary["methods"][name]
            lines.append([
                f"*{name}*" if name in ORACLES else name,
                _percent(row["accuracy_percent"], len(runs)),
                "" if name == "sft" else _percent(row["to_sft_points"], len(runs), "+.1f"),
                *(_number(_mean(runs, column)) for column in shown),
            ])  # fmt: skip
        head = ["method", f"{measured(results)} (%)", "to sft (points)", *(COLUMNS[name] for name in shown)]
        parts.append(f"**{words(cell)}**\n\n{markdown_table(head, lines)}")
        if results.get("instructions"):
            parts.append(instruction_table(results, cell))
    return "\n".join(parts if results.get("instructions") else [*parts, NOT_MEASURED])


def instruction_table(results: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Instruction following at one point after the first seed's runs, in percent; intervals draw prompts again."""
    asked = results["instructions"]["asked"]
    first, *_ = results["untrained"].values()
    before = [first["instructions"]]
    lines = [["*untrained*", *followed_cells(before, asked), "", "", ended_cell(before)]]
    for name, runs in cell["runs"].items():
        found = _asked(runs)
        beside = _asked(cell["runs"].get(BASELINE, []))
        lines.append([
            f"*{name}*" if name in ORACLES else name,
            *followed_cells(found, asked),
            gained_cell(found, before * len(found)),
            "" if name == BASELINE or not beside else gained_cell(found, beside),
            ended_cell(found),
        ])  # fmt: skip
    count, longest = len(asked), results["instructions"]["answer_tokens"]
    said = f"Instructions that a program can check (IFEval), asked after the first seed's run: {count} prompts, "
    said += f"answers cut at {longest} tokens\n\n"
    return said + markdown_table(["method", *HEADS, f"{HEADS[0]}, to untrained", "to sft", "ended"], lines)


def untrained_table(results: Mapping[str, Any]) -> str:
    """Instruction following of the untrained model on all prompts, a line a length of answer."""
    lines = [
        [length, *followed_cells([found], results["asked"]), ended_cell([found])]
        for length, found in results["lengths"].items()
    ]
    return markdown_table(["answers cut at (tokens)", *HEADS, "ended"], lines)


def _asked(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the runs that were asked to follow instructions, what they followed."""
    return [run["instructions"] for run in runs if "instructions" in run]


def measured(results: Mapping[str, Any]) -> str:
    """What the first column counts: answered prompts, or tokens of written answers that are the model's first choice."""
    return "first choice" if results["config"]["tasks"] in WRITTEN else "completed"


def short_table(results: Mapping[str, Any]) -> str:
    """What each contender completed, a column a point of the map; of written answers their NLL, too."""
    cells, told = results["cells"], results["summary"]["cells"]
    with_nll = results["config"]["tasks"] in WRITTEN
    first, *_ = results["untrained"].values()
    lines = [["*untrained*", *(f"{first['accuracy_percent']:.1f}" for _ in cells)]]
    if with_nll:
        lines[0] += [f"{first['nll']:.3f}" for _ in cells]
    for name in dict.fromkeys(name for cell in cells for name in cell["runs"]):
        line = [f"*{name}*" if name in ORACLES else name]
        for cell, summary in zip(cells, told, strict=True):
            runs = cell["runs"].get(name, [])
            line.append(_percent(summary["methods"][name]["accuracy_percent"], len(runs)) if runs else "")
        if with_nll:
            line += [_number(_mean(cell["runs"].get(name, []), "nll")) for cell in cells]
        lines.append(line)
    head = [f"{measured(results)}, %", *map(words, cells)]
    return markdown_table([*head, *(f"NLL, {words(cell)}" for cell in cells)] if with_nll else head, lines)


def marked_table(results: Mapping[str, Any]) -> str:
    """Area under the ROC of each score against the marks of the rows, with its interval, a column a data set."""
    data = results["data"]
    lines = [
        ["rows (marked)", *(f"{one['rows']} ({one['marked_rows']})" for one in data.values())],
        ["base's mean surprise, nats a token", *(f"{one['nll_mean']:.2f}" for one in data.values())],
    ]
    for name in dict.fromkeys(name for one in data.values() for name in one["by_row"]):
        found = [one["by_row"].get(name) for one in data.values()]
        lines.append([name, *("" if f is None else f"{f[0]:.2f} ({f[1]:.2f} .. {f[2]:.2f})" for f in found)])
    return markdown_table(["area (0.5 is a coin), 95 % interval", *(f"`{name}`" for name in data)], lines)


def repaired_table(results: Mapping[str, Any]) -> str:
    """How each target answers the flawed skill, rightly and as the flaw would, and all else; a group of columns a flaw."""
    conditions = [condition for condition in results["conditions"] if condition["flaw"] != "none"]
    counted = {"corrected_percent": "right", "flawed_percent": "as the flaw", "accuracy_percent": "all else"}
    head = ["%", *(f"{condition['flaw']}: {word}" for condition in conditions for word in counted.values())]
    lines = [["*untrained*", *(f"{results['untrained'][c['flaw']][key]:.1f}" for c in conditions for key in counted)]]
    for name in dict.fromkeys(name for condition in conditions for name in condition["runs"]):
        runs = [condition["runs"].get(name) for condition in conditions]
        lines.append(
            [name, *("" if found is None else f"{_mean(found, key):.1f}" for found in runs for key in counted)]
        )
    return markdown_table(head, lines)


REAL_MODEL = """\
## On a real model

SmolLM2-135M-Instruct, with the four-bit weights of its package ([real_model.md](real_model.md)): sizes are small, **one seed ranks
nothing**, and all is published as found. The sections after this one are controlled experiments on models of about a million
parameters that were trained here.
"""


def real_model_part(
    tuned: Mapping[str, Any] | None,
    noise: Mapping[str, Any] | None,
    solved: Mapping[str, Any] | None,
    marked: Mapping[str, Any] | None,
    prior: Mapping[str, Any] | None,
    distill: Mapping[str, Any] | None,
) -> str:
    """What was measured on the real model; what was not is said."""
    parts = [REAL_MODEL]
    bench = "qtarget bench noise --base smollm2 --short --data ../shared/data"
    for title, found, table, how in (
        ("Noise, each contender tuned", tuned, short_table, f"{bench} --rate 0.001 --rate 0.002 --seeds 3"),
        ("Noise, nothing tuned, computed in float32", noise, short_table, f"{bench} --dtype float32"),
        ("Wrong solutions of GSM8K", solved, short_table, f"{bench} --tasks gsm8k"),
        ("Which rows are wrong", marked, marked_table, "python scripts/measure_marked_rows.py --base runs/smollm2"),
        ("A flawed prior", prior, repaired_table, "qtarget bench prior --base smollm2 --short"),
        (
            "Less data",
            distill,
            real_distill_table,
            "qtarget bench distill --base smollm2 --short --data ../shared/data",
        ),
    ):
        shown = f"Not measured yet: `{how}`.\n" if found is None else f"`{how}`:\n\n{table(found)}"
        parts.append(f"**{title}.** {shown}")
    return "\n".join(parts)


def _percent(row: Mapping[str, float], seeds: int, form: str = ".1f") -> str:
    return with_ends(row, form) if seeds > 2 else f"{row['mean']:{form}}"


def _mean(runs: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [run[name] for run in runs if run.get(name) is not None]
    return fmean(values) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
