"""``qtarget demo``: compare targets on noisy demonstrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.benchmarks.demo.bench import noise_words, quick, run_demo
from qtarget.benchmarks.demo.runs import DemoConfig
from qtarget.cli.options.numbers import finite
from qtarget.cli.options.outputs import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

DEFAULTS = DemoConfig()


def demo(
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = DEFAULTS.seeds,
    targets: Annotated[str, typer.Option(help="Comma-separated names; sft is always compared with.")] = ", ".join(
        DEFAULTS.targets
    ),
    kind: Annotated[
        str, typer.Option(help="Noise: random_tokens, wrong_answer, boilerplate, contradictory_duplicate.")
    ] = DEFAULTS.kind,
    rate: Annotated[
        float, typer.Option(callback=finite, min=0, max=1, help="Share of response tokens (random_tokens) or rows.")
    ] = DEFAULTS.rate,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each; numbers do not depend on it.")
    ] = DEFAULTS.workers,
    is_quick: Annotated[bool, typer.Option("--quick", help="One seed, two targets, few rows: a smoke test.")] = False,
) -> None:
    """Train the embedded base on noisy rows with several targets; count exact answers on clean held-out prompts."""
    from rich.console import Console

    names = tuple(name.strip() for name in targets.split(",") if name.strip())
    config = replace(DEFAULTS, seeds=seeds, targets=names, kind=kind, rate=rate, workers=workers)
    config = quick(config) if is_quick else config
    console = Console()
    with progress_bar() as advance:
        results = run_demo(config, output, advance)
    console.print(results_table(results, noise_words(config)))
    console.print(results["finding"], soft_wrap=True, highlight=False)
    console.print(
        f"{results['seconds']:.0f} s; {output / 'results.json'}, {output / 'results.png'}",
        soft_wrap=True,
        highlight=False,
    )


def results_table(results: dict[str, Any], noise: str) -> Table:
    """Targets from best to worst, the untrained model last."""
    from rich import box
    from rich.table import Table

    config = results["config"]
    epochs = f"{config['epochs']} epoch{'s' if config['epochs'] > 1 else ''}"
    table = Table(
        title=f"{config['train_rows']} demonstrations with {noise}, {epochs}, learning rate {config['learning_rate']:g}",
        caption=f"answered: exact match of greedy completions on {config['test_rows']} clean prompts. Means over "
        f"{config['seeds']} seeds; in brackets, smallest..largest seed (no confidence interval). kept: skills "
        f"of the base that no demonstration shows, in its own format, {config['kept_rows']} prompts.",
        box=box.SIMPLE,
    )
    for column in ("target", "answered, %", "vs sft, points", "kept, %"):
        table.add_column(column, justify="left" if column == "target" else "right", no_wrap=True)
    for name, row in sorted(results["summary"].items(), key=lambda item: -item[1]["accuracy_percent"]["mean"]):
        difference = "" if name == "sft" else _with_range(row["difference_to_sft_points"], "+.1f", "+.0f")
        table.add_row(name, _with_range(row["accuracy_percent"]), difference, _with_range(row["kept_percent"]))
    untrained = results["untrained"]
    table.add_row("(untrained)", f"{untrained['accuracy_percent']:.1f}", "", f"{untrained['kept_percent']:.1f}")
    return table


def _with_range(row: dict[str, float], mean: str = ".1f", ends: str = ".1f") -> str:
    return f"{row['mean']:{mean}} ({row['low']:{ends}}..{row['high']:{ends}})"
