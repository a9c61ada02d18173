"""``qtarget report``: compare runs, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.cli.options.outputs import OverwriteOption
from qtarget.core.errors import ConfigError, DataError, counted

if TYPE_CHECKING:
    from qtarget.cli.options.outputs import Mark
    from qtarget.report.runs.document import Run

MEASURES = (
    ("nll", "clean_nll", "nll on evaluation rows, nats a token"),
    ("reward", "rewards", "reward of samples; of other rows where they were evaluated"),
)
"""Metric, its summary in the document, and what its table says."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.")],
    output: Annotated[
        Path | None, typer.Option(help="The page: one HTML file; default: RUN-report.html beside the run.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Folder for the figures as PNG.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="The same numbers as JSON.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Score two checkpoints of each run on the rows of this file.")
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option("--from-step", help="Compare tokens from this evaluation or checkpoint; default: first."),
    ] = None,
    to_step: Annotated[int | None, typer.Option("--to-step", help="... to this one; default: last.")] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Compare runs: NLL on evaluation rows, objective, weights over time, and what changed token by token."""
    from qtarget.cli.options.outputs import (
        Mark,
        beside_runs,
        check_outputs,
        say_written,
        write_numbers,
        write_page,
    )
    from qtarget.report.runs.document import STATE_FILE, check_comparable, compare_runs, read_runs, sample_changes
    from qtarget.report.runs.figures import runs_page, write_pngs
    from qtarget.report.runs.records import RECORDS

    records = [run / name for run in runs for name in (*RECORDS, STATE_FILE)]
    checkpoints = [path for run in runs for path in run.glob("checkpoint-*")]
    mark, read = Mark.of("report", [*runs, rows]), [*records, *checkpoints, rows]
    output = output or beside_runs(runs, "report.html")
    check_outputs({"--output": output, "--json": json_file}, read, mark=mark, replaces=overwrite)
    if png is not None:
        check_pictures(png, read, None if overwrite else mark)
    found = read_runs(runs)
    check_comparable(found, same_rows=rows is not None)
    changes = [
        change
        for run in found
        for change in (
            sample_changes(run, from_step, to_step)
            if rows is None
            else [checkpoint_change(run, rows, from_step, to_step)]
        )
    ]
    result = compare_runs(found, changes, same_rows=rows is not None)
    write_page(output, runs_page(result), mark)
    if json_file is not None:
        write_numbers(json_file, result, mark)
    pictures = write_pngs(result, png, str(mark)) if png else []
    print_report(result)
    say_written([output, json_file, *pictures])


def check_pictures(folder: Path, inputs: list[Path | None], mark: Mark | None) -> None:
    """Raise where figures must not be written.

    Args:
        mark: which pictures there must carry, where their names are ours; None: they may be replaced.

    Raises:
        ConfigError: the folder is a file, a model, a cache or a checkpoint lies there, or somebody's pictures.
    """
    from qtarget.cli.options.outputs import refuse_existing
    from qtarget.report.runs.figures import FIGURES
    from qtarget.storage.folders import CACHE, MODEL, NAMES, is_inside, is_same, kind_of

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--png {folder} is a file; name a folder")
    for source in inputs:
        if source is not None and source.is_dir() and (is_same(folder, source) or is_inside(folder, source)):
            raise ConfigError(f"--png {folder} is in {source}, which is read here; choose another folder")
    if (kind := kind_of(folder)) in (MODEL, CACHE):
        raise ConfigError(f"--png {folder} holds {NAMES[kind]}; choose another folder")
    if mark is not None:
        for path in (found for name in FIGURES for found in folder.glob(f"{name}.png")):
            refuse_existing(path, "--png", mark)


def checkpoint_change(run: Run, rows: Path, first: int | None, last: int | None) -> dict[str, Any]:
    """What changed on the rows of a file between two checkpoints of a run.

    Raises:
        DataError: the run has no two checkpoints, or none at a step.
    """
    from qtarget.cli.options.datasets import options_elsewhere
    from qtarget.data.loading import load_dataset_file
    from qtarget.integrations.sft.rows import score_checkpoints
    from qtarget.report.runs.tokens import token_changes

    steps = dict(run.checkpoints)
    if len(steps) < 2:
        raise DataError(
            f"{run.name} has {counted(len(steps), 'checkpoint')}, and two are compared; train with "
            "save_strategy: epoch (or steps), or leave --rows out"
        )
    ends = [min(steps) if first is None else first, max(steps) if last is None else last]
    for step in ends:
        if step not in steps:
            raise DataError(f"{run.name} has no checkpoint at step {step}; there are {', '.join(map(str, steps))}")
    if ends[0] == ends[1]:
        raise ConfigError(f"--from-step and --to-step are both {ends[0]}; name two checkpoints")
    settings = run.description.get("settings") or {}
    data = load_dataset_file(rows, options_elsewhere(settings))
    before, after = score_checkpoints([steps[step] for step in ends], data, settings)
    where = {"run": run.name, "source": "checkpoints", "rows_of": rows.name, "from_step": ends[0], "to_step": ends[1]}
    return where | token_changes(before, after)


def print_report(result: dict[str, Any]) -> None:
    """A line a run, and the finding."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for metric, summary, caption in MEASURES:
        # a run of samples has rewards and often no nll; one that has neither stands in the first table
        shown = [run for run in result["runs"] if run[summary] or (metric == "nll" and not run["rewards"])]
        table = Table(box=box.SIMPLE, caption=caption)
        for column in ("run", "target", "state", "step", "rows", f"first {metric}", f"last {metric}"):
            table.add_column(
                column, justify="right" if metric in column or column == "step" else "left", overflow="fold"
            )
        for run in shown:
            about = (run["name"], run["target"] or "-", run["status"]["state"], str(run["status"]["step"]))
            for name, found in run[summary].items() or [("-", None)]:
                ends = [f"{found[end][metric]:.4f}" for end in ("first", "last")] if found else ["-", "-"]
                if found and found["first"]["step"] == found["last"]["step"]:
                    ends[0] = "-"  # one evaluation is no course
                # ``Text``, because names and notes may hold brackets, which rich would read as markup
                table.add_row(*map(Text, (*about, name, *ends)))
        if shown:
            console.print(table)
    for run in result["runs"]:
        for note in [*run["notes"], *([run["status"]["reason"]] if run["status"]["reason"] else [])]:
            console.print(Text(f"{run['name']}: {note}", style="yellow"), soft_wrap=True)
    console.print(Text(result["finding"]), soft_wrap=True)
