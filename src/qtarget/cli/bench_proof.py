"""``qtarget bench distill``: the claims, tested."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qtarget.benchmarks.distill import DistillConfig, quick, run_distill
from qtarget.cli.outputs import check_writable, progress_bar, saver

DISTILL = DistillConfig()


def distill(
    output: Annotated[Path, typer.Option(help="Raw results, JSON; a figure is drawn beside them.")] = Path(
        "runs/distill.json"
    ),
    is_quick: Annotated[bool, typer.Option("--quick", help="Three methods, one seed: a smoke test.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the finished runs beside --output.")] = False,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each; numbers do not depend on it.")
    ] = DISTILL.workers,
) -> None:
    """Does a student match cross entropy on a teacher's text with less data when it sees the teacher's distribution?"""
    from rich.console import Console
    from rich.markdown import Markdown

    from qtarget.benchmarks.distill_results import distill_figure, distill_table
    from qtarget.benchmarks.figure import save_figure

    check_writable(output)
    config = replace(quick(DISTILL) if is_quick else DISTILL, workers=workers)
    with progress_bar() as advance:
        results = run_distill(config, output, resume=resume, progress=advance)
    saver(output)(results)
    figure = output.with_suffix(".png")
    save_figure(distill_figure(results), figure)
    console = Console()
    console.print(Markdown(distill_table(results)))
    console.print(results["finding"], soft_wrap=True, highlight=False)
    console.print(f"{results['seconds']:.0f} s; {output}, {figure}", soft_wrap=True, highlight=False)
