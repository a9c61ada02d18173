"""``qtarget demo``: one decision on noisy rows, told with two bases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.cli.options.outputs import progress_bar
from qtarget.core.errors import ConfigError, counted

if TYPE_CHECKING:
    from rich.table import Table

    from qtarget.benchmarks.demo.bench import DemoConfig

SEEDS, WORKERS = 3, 2
NEXT = "Try it on your rows: qtarget init ROWS.jsonl --model MODEL"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for results.json and results.png.")] = Path("runs/demo"),
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many draws of noise and order; default: 3, and 1 with --real.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each; numbers do not depend on it.")
    ] = WORKERS,
    is_quick: Annotated[bool, typer.Option("--quick", help="One seed, two methods, few steps: a smoke test.")] = False,
    is_rl: Annotated[
        bool, typer.Option("--rl", help="Instead: samples of one's own, with rewards or a teacher, fresh and stale.")
    ] = False,
    is_real: Annotated[
        bool,
        typer.Option("--real", help="Instead: SmolLM2-135M, from a package; adapters, 400 rows, within 20 minutes."),
    ] = False,
) -> None:
    """Fine-tune two small bases on noisy rows in seven ways; count exact answers on clean held-out prompts."""
    if is_rl and is_real:
        raise ConfigError("--rl and --real are two demos; give one of them")
    if is_rl:
        demo_rl(output, seeds or SEEDS, workers, is_quick)
        return
    if is_real:
        demo_real(output, seeds or 1, workers, is_quick)
        return

    from qtarget.benchmarks.demo.bench import DemoConfig, quick

    config = replace(DemoConfig(), seeds=seeds or SEEDS, workers=workers)
    config = quick(config) if is_quick else config
    told(config, output, "a model of 1.1 million parameters; about 2 minutes on 2 cores", 640)


def demo_real(output: Path, seeds: int, workers: int, is_quick: bool) -> None:
    """``--real``: the same on an instruct model that others trained; its folder is made beside the output, once.

    Raises:
        MissingDependencyError: the package with the weights is not installed.
    """
    from qtarget.benchmarks.pool import quiet_libraries
    from qtarget.benchmarks.real.demo import RealDemoConfig, quick
    from qtarget.benchmarks.real.model import FOLDER, NAME, prepared

    with quiet_libraries():
        folder = prepared(output.parent / FOLDER.name)
    config = RealDemoConfig(seeds=seeds, workers=workers, folder=str(folder))
    config = quick(config) if is_quick else config
    told(
        config, output, f"{NAME} (four-bit weights) by adapters; within 20 minutes on 2 cores", config.scope.train_rows
    )


def told(config: DemoConfig, output: Path, of_what: str, rows: int) -> None:
    """Run a demo and say what it found."""
    from rich.console import Console

    from qtarget.benchmarks.demo.bench import run_demo

    console = Console()
    console.print(
        f"{len(list(config.jobs()))} fine-tunings of {of_what}. "
        f"{100 * config.rate:g} % of the response tokens of {rows} rows are random."
    )
    with progress_bar() as advance:
        results = run_demo(config, output, advance)
    console.print(results_table(results))
    console.print(results["finding"], soft_wrap=True, highlight=False)
    console.print(
        f"{results['seconds']:.0f} s; {output / 'results.json'}, {output / 'results.png'}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print(NEXT, soft_wrap=True, highlight=False)


def demo_rl(output: Path, seeds: int, workers: int, is_quick: bool) -> None:
    """``--rl``: one start, six ways to go on; sampled and greedy answers to held-out prompts."""
    from rich.console import Console

    from qtarget.benchmarks.demo.rl import RLDemoConfig, quick, run_rl_demo

    config = RLDemoConfig(seeds=seeds, workers=workers)
    config = quick(config) if is_quick else config
    console = Console()
    console.print(
        f"{len(list(config.jobs()))} runs of a model of 1.1 million parameters from one start; about 4 minutes on 2 cores."
    )
    with progress_bar() as advance:
        results = run_rl_demo(config, output, advance)
    console.print(rl_table(results))
    console.print(
        f"{results['seconds']:.0f} s; {output / 'results.json'}, {output / 'results.png'}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
    console.print("Try it on your prompts: qtarget rl CONFIG.yaml (docs/rl.md)", soft_wrap=True, highlight=False)


def rl_table(results: dict[str, Any]) -> Table:
    """A row a way, sampled and greedy answers; start and teacher last."""
    from rich import box
    from rich.table import Table

    from qtarget.benchmarks.demo.rl import SCORES

    table = Table(
        title="held-out prompts answered exactly, %",
        caption=f"means over {counted(results['config']['seeds'], 'seed')}; in brackets, smallest..largest seed (no confidence "
        f"interval). {results['samples_per_run']} rows a run: samples, or demonstrations for sft. Stale: weights of four rounds "
        "ago sample, four updates a round. KL: to the sampler, nats a token.",
        box=box.SIMPLE,
    )
    table.add_column("goes on with")
    for words in (*SCORES.values(), "KL", "blocked"):
        table.add_column(words, justify="right")
    for name, row in results["summary"].items():
        scores = [f"{row[key]['mean']:.1f} ({row[key]['low']:.1f}..{row[key]['high']:.1f})" for key in SCORES]
        seen = [f"{row['kl_k3']['mean']:.3f}", f"{row['blocked']['mean']:.1%}"] if "kl_k3" in row else ["-", "-"]
        table.add_row(name, *scores, *seen)
    for role, scores in results["models"].items():
        table.add_row(f"({role})", *(f"{scores[key]:.1f}" for key in SCORES), "-", "-")
    return table


def results_table(results: dict[str, Any]) -> Table:
    """A column a base; the untrained model last."""
    from rich import box
    from rich.table import Table

    from qtarget.benchmarks.demo.bench import ORACLE

    table = Table(
        title="clean held-out prompts answered exactly, %",
        caption=f"means over {counted(results['config']['seeds'], 'seed')}; in brackets, smallest..largest seed (no confidence "
        f"interval). Learning rates: {results['rates_are']}. The oracle is told which tokens are noise.",
        box=box.SIMPLE,
    )
    table.add_column("trained with")
    for base, regime in results["regimes"].items():
        table.add_column(
            f"{results['bases'][base]}\n(its first choice: {regime['favourite_share']:.0%} of labels)", justify="right"
        )
    for name in results["config"]["methods"]:
        rows = [regime["summary"][name]["accuracy_percent"] for regime in results["regimes"].values()]
        words = f"{name} (oracle)" if name == ORACLE else name
        table.add_row(words, *(f"{row['mean']:.1f} ({row['low']:.1f}..{row['high']:.1f})" for row in rows))
    untrained = [regime["untrained"]["accuracy_percent"] for regime in results["regimes"].values()]
    table.add_row("(untrained)", *(f"{value:.1f}" for value in untrained))
    return table
