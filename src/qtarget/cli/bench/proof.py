"""``qtarget bench noise | distill | prior | staleness``: the claims, tested."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.benchmarks.pool import WORKERS, refuse_earlier
from qtarget.benchmarks.start import Start, start_of
from qtarget.cli.bench.real import real_distill, real_noise, real_prior, size_of
from qtarget.cli.options.interrupts import on_interrupt
from qtarget.cli.options.outputs import check_writable, progress_bar, saver
from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.benchmarks.noise.bench import NoiseConfig

Output = Annotated[Path, typer.Option(help="Raw results, JSON; a figure is drawn beside them.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the finished runs beside --output.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of real data: tasks, texts for --scale gpu, what --base smollm2 is asked.")
]
Scale = Annotated[
    str, typer.Option(help="cpu: the embedded base; gpu: a base of 36 million parameters, trained first on real texts.")
]
Corpus = Annotated[Path | None, typer.Option(help="Text file for --scale gpu; paragraphs are apart by a blank line.")]
BASE_HELP = "embedded; or smollm2, a real model from a package (or the folder of `bench base`)."
Processes = Annotated[
    int, typer.Option(min=1, help="Processes of one thread each; on a CPU numbers do not depend on it.")
]


def distill(
    output: Output = Path("runs/distill.json"),
    is_quick: Annotated[bool, typer.Option("--quick", help="Three methods, one seed: a smoke test.")] = False,
    is_long: Annotated[
        bool, typer.Option("--long", help="Eight methods, 300 steps instead of 80: rows are scarce, and not steps.")
    ] = False,
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "embedded",
    is_short: Annotated[
        bool, typer.Option("--short", help="With a real base: three contenders, two students, one seed.")
    ] = False,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this line of the table; may be repeated.")
    ] = None,
    resume: Resume = False,
    workers: Processes = WORKERS,
    scale: Scale = "cpu",
    data: Data = None,
    corpus: Corpus = None,
) -> None:
    """Does a student match cross entropy on a teacher's text with less data when it sees the teacher's distribution?"""
    from qtarget.benchmarks.distill.bench import DistillConfig, long, quick, run_distill
    from qtarget.benchmarks.distill.results import distill_figure, distill_table

    if is_quick and is_long:
        raise ConfigError("--quick and --long contradict each other; give one of them")
    check_writable(output)
    size = size_of(is_quick, is_short, base)
    if base != "embedded":
        if is_long or scale != "cpu" or corpus is not None or data is None or methods:
            raise ConfigError(
                f"--base {base} is distilled on real text, in sizes of its own: name the folder with --data; of the others, "
                "--quick and --short go with it"
            )
        real_distill(base, size, data, output, resume, workers, kept)
        return
    start, full = started(scale, data, corpus, output, resume, is_quick), DistillConfig()
    config = replace(quick(full) if is_quick else long(full) if is_long else full, workers=workers, start=start)
    config = replace(config, learning_rates=start.rates(config.learning_rates))
    config = replace(config, methods=tuple(methods or config.methods))
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_distill(config, output, resume=resume, progress=advance)
    saver(output)(results)
    show(results["finding"], output, distill_table(results), distill_figure(results), f"{results['seconds']:.0f} s; ")


def noise(
    output: Output = Path("runs/noise.json"),
    tasks: Annotated[
        str,
        typer.Option(
            help="embedded or caesar; or scan, math, cogs, listops (with --data); with a real base embedded, scan, dolly, "
            "alpaca, gsm8k."
        ),
    ] = "embedded",
    data: Data = None,
    is_quick: Annotated[
        bool, typer.Option("--quick", help="Three methods, one point of the map: a smoke test.")
    ] = False,
    is_crossfit: Annotated[
        bool, typer.Option("--crossfit", help="Contenders that train copies first, three seeds at four points.")
    ] = False,
    steps_grid: Annotated[
        list[int] | None, typer.Option(min=1, help="Steps that every method tunes; give it once for each number.")
    ] = None,
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "embedded",
    is_short: Annotated[
        bool, typer.Option("--short", help="With a real base: five contenders, three points, one seed, one rate.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of a real base: bfloat16 (the default), or float32, two to three times slower.")
    ] = None,
    equal_compute: Annotated[
        bool, typer.Option("--equal-compute", help="Contenders without copies get the steps that copies cost.")
    ] = False,
    cells: Annotated[
        list[str] | None,
        typer.Option("--cell", help="Only this point: BASE:KIND:RATE, as none:wrong_answer:0.4; may be repeated."),
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Only this line of the table; may be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Draws of noise and order of the final runs.")] = None,
    rates: Annotated[
        list[float] | None, typer.Option("--rate", help="Only this learning rate; may be repeated.")
    ] = None,
    resume: Resume = False,
    workers: Processes = WORKERS,
    scale: Scale = "cpu",
    corpus: Corpus = None,
) -> None:
    """Which targets survive noise, by how much the base already knows? The map of rate and base, every method tuned alike."""
    from qtarget.benchmarks.noise.bench import CROSSFITTED, GPU, QUICK, REAL, NoiseConfig, run_noise
    from qtarget.benchmarks.noise.results import noise_figure, noise_table
    from qtarget.benchmarks.noise.runs import KINDS
    from qtarget.benchmarks.real.demonstrations import kinds_of
    from qtarget.benchmarks.tasks import BASES, task_set

    if is_quick + is_crossfit + is_short > 1:
        raise ConfigError("--quick, --short and --crossfit contradict each other; give one of them")
    check_writable(output)
    if base != "embedded":
        if is_crossfit or steps_grid or equal_compute or corpus is not None or scale != "cpu":
            raise ConfigError(
                f"--base {base} has sizes of its own: --crossfit, --steps-grid, --equal-compute, --corpus and --scale do not go "
                "with it"
            )
        size = size_of(is_quick, is_short, base)
        part = partial(
            chosen_part, cells=cells, names=methods, seeds=seeds, rates=rates, bases=("smollm2",), kinds=kinds_of(tasks)
        )
        real_noise(base, size, tasks, dtype, data, output, resume, workers, kept, part)
        return
    if dtype:
        raise ConfigError("--dtype goes with a real base, as other bases train all their weights; add --base smollm2")
    size_of(is_quick, is_short, base)
    task_set(tasks, data)  # says what is missing before a base is trained
    start = started(scale, None if scale == "cpu" else data, corpus, output, resume, is_quick)
    full = CROSSFITTED if is_crossfit else GPU if scale == "gpu" else REAL.get(tasks, NoiseConfig())
    config = replace(
        QUICK if is_quick else full,
        tasks=tasks,
        data=None if data is None else str(data),
        workers=workers,
        steps_grid=tuple(steps_grid or ()),
        equal_compute=equal_compute,
    )
    config = chosen_part(config, cells, methods, seeds, rates, tuple(BASES), KINDS)
    config = replace(config, start=start, learning_rates=start.rates(config.learning_rates))
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_noise(config, output, resume=resume, progress=advance)
    drawn = any(cell["kind"] == "random_tokens" for cell in results["cells"])  # the figure is the map of these
    show(results["summary"]["finding"], output, noise_table(results), noise_figure(results) if drawn else None)


def chosen_part(
    config: NoiseConfig,
    cells: list[str] | None,
    names: list[str] | None,
    seeds: int | None,
    rates: list[float] | None,
    bases: Collection[str],
    kinds: Collection[str],
) -> NoiseConfig:
    """A setting with what the command line names in the place of its own; ``bases`` and ``kinds`` are those of its points.

    Raises:
        ConfigError: a point that is none, an unknown method, or methods without the one that they are compared with.
    """
    from qtarget.benchmarks.noise.results import BASELINE
    from qtarget.benchmarks.noise.runs import parse_cell

    if cells:
        config = replace(config, cells=tuple(parse_cell(text, bases, kinds) for text in cells), screen=())
    if names and BASELINE not in names:
        raise ConfigError(f"--method: the lines are compared with {BASELINE}; add --method {BASELINE}")
    if names:
        config = replace(config, names=tuple(names))
    return replace(config, seeds=seeds or config.seeds, learning_rates=tuple(rates or config.learning_rates))


def prior(
    output: Output = Path("runs/prior.json"),
    is_quick: Annotated[bool, typer.Option("--quick", help="Two targets, one flaw, one seed: a smoke test.")] = False,
    base: Annotated[str, typer.Option(help=BASE_HELP)] = "embedded",
    is_short: Annotated[
        bool, typer.Option("--short", help="With a real base: four targets, two flaws, one seed.")
    ] = False,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Only this target, with and without guard; may be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Draws of rows and order.")] = None,
    resume: Resume = False,
    workers: Processes = WORKERS,
    scale: Scale = "cpu",
    data: Data = None,
    corpus: Corpus = None,
) -> None:
    """Is a flawed prior amplified, and what does the guard against it correct and cost?"""
    from qtarget.benchmarks.prior.bench import QUICK, PriorConfig, run_prior
    from qtarget.benchmarks.prior.results import prior_figure, prior_table

    check_writable(output)
    size = size_of(is_quick, is_short, base)
    if base != "embedded":
        if scale != "cpu" or data is not None or corpus is not None or targets or seeds:
            raise ConfigError(f"--base {base} has sizes of its own: of the others, --quick and --short go with it")
        real_prior(base, size, output, resume, workers, kept)
        return
    start = started(scale, data, corpus, output, resume, is_quick)
    config = replace(QUICK if is_quick else PriorConfig(), workers=workers, start=start)
    config = replace(config, targets=tuple(targets or config.targets), seeds=seeds or config.seeds)
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_prior(config, output, resume=resume, progress=advance)
    show(results["summary"]["finding"], output, prior_table(results), prior_figure(results))


def staleness(
    output: Output = Path("runs/staleness.json"),
    is_quick: Annotated[
        bool, typer.Option("--quick", help="Four points, usual thresholds, 3 seeds: a minute.")
    ] = False,
    is_model: Annotated[
        bool, typer.Option("--model", help="Instead: the embedded base at four points, sampled and greedy answers.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Of the final runs.")] = None,
    resume: Resume = False,
    workers: Processes = WORKERS,
) -> None:
    """Which trust region stands old, reused and wrongly sampled data? A policy whose success is computed, not sampled."""
    from qtarget.benchmarks.staleness.bench import QUICK, StalenessConfig, run_staleness
    from qtarget.benchmarks.staleness.model_bench import QUICK_MODEL, ModelConfig, model_table
    from qtarget.benchmarks.staleness.results import penalties_table, rules_table, staleness_figure, staleness_table

    check_writable(output)
    small, full = (QUICK_MODEL, ModelConfig()) if is_model else (QUICK, StalenessConfig())
    config = replace(small if is_quick else full, workers=workers)
    config = replace(config, seeds=seeds or config.seeds)
    with progress_bar() as advance, on_interrupt(lambda: kept(output)):
        results = run_staleness(config, output, resume=resume, progress=advance)
    if is_model:
        show(results["summary"]["finding"], output, model_table(results), None)
        return
    tables = "\n".join(make(results) for make in (staleness_table, penalties_table, rules_table))
    show(results["summary"]["finding"], output, tables, staleness_figure(results))


def kept(output: Path) -> str:
    """What of a benchmark that is ended early is safe, in words."""
    runs = output.with_suffix(".runs.jsonl")
    count = len(runs.read_text(encoding="utf-8").splitlines()) if runs.is_file() else 0
    return f"{count} finished runs are kept in {runs}; go on with the same command and --resume"


def started(scale: str, data: Path | None, corpus: Path | None, output: Path, resume: bool, is_quick: bool) -> Start:
    """The model that all bases begin with; a larger one is trained beside the results, if runs may begin there."""
    refuse_earlier(output.with_suffix(".runs.jsonl"), resume)
    return start_of(scale, data, corpus, output.with_suffix(".start"), typer.echo, is_quick)


def show(finding: str, output: Path, table: str, figure: Any, took: str = "") -> None:
    """Table and finding on the terminal, the figure beside the results."""
    from rich.console import Console
    from rich.markdown import Markdown

    from qtarget.benchmarks.figure import save_figure

    if figure is not None:
        save_figure(figure, output.with_suffix(".png"))
    console = Console()
    console.print(Markdown(table))
    console.print(finding, soft_wrap=True, highlight=False)
    drawn = "" if figure is None else f", {output.with_suffix('.png')}"
    console.print(f"{took}{output}{drawn}", soft_wrap=True, highlight=False)
