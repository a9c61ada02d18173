"""``qtarget compare``: which target, and does it help, on the user's own rows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qtarget.core.errors import ConfigError
from qtarget.report.audit.contenders import USUAL

if TYPE_CHECKING:
    from qtarget.cli.options.settings import Setting
    from qtarget.comparison.sets import Metric
    from qtarget.evaluation.evaluate import SetName

KEY = "compare"
"""Of a config: a list of contenders, for `qtarget compare` alone."""
TARGETS, RATES = ",".join(USUAL), "0.3,1,3"
PIPED_WIDTH = 160


def compare(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="As for `qtarget train`, with validation_file.")
    ],
    targets: Annotated[
        str | None,
        typer.Option(help=f"Names, name(key=value) or module:Class; default: {TARGETS} and the config's own."),
    ] = None,
    filters: Annotated[
        str | None, typer.Option(help="Rules, such as none,auto,agreement; default: the config's filter, else none.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each contender, at its tuned learning rate.")] = 3,
    rates: Annotated[str, typer.Option(help="Learning rates tried, as multiples of the config's.")] = RATES,
    metric: Annotated[
        str | None,
        typer.Option(
            help="exact, regex, number, json, nll, or your module:function; default: exact, nll without answers."
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="For regex; its first group is the answer.")] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="For exact and regex.")] = False,
    forgetting: Annotated[Path | None, typer.Option(help="Rows of what the base could do before.")] = None,
    forgetting_metric: Annotated[str | None, typer.Option(help="As --metric; default: --metric's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default: the config's output_dir with -compare.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the finished runs there.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="90s, 30m, 2h: plans what fits, and says what it leaves out.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a GPU, else one a core.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who runs the processes.")] = "local",
    ray_address: Annotated[str | None, typer.Option(help="Of a running cluster; default: this machine.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows measured at once.")] = 32,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; see `qtarget evaluate`.")] = None,
) -> None:
    """Train contenders alike, judge them on the config's validation rows, and say which to take."""
    from qtarget.cli.compared import comparison_folder
    from qtarget.cli.comparing import PAGE, Machine, Request
    from qtarget.cli.filtered import refuse_weighed
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.contenders import find_contenders, split_outside
    from qtarget.cli.options.early import check_config
    from qtarget.cli.options.settings import read_settings
    from qtarget.command import remember
    from qtarget.comparison.budget import Plan, parse_budget
    from qtarget.comparison.kept import DOCUMENT
    from qtarget.filtering.decision import Filter

    begin = time.monotonic()
    settings = read_settings(config, context.args)
    refuse_several(settings)
    check_config(config, context.args)
    remember(config, context.args)
    seconds = None if budget is None else parse_budget(budget)
    grid = parse_rates(rates)
    metrics = _metrics(metric, pattern, ignore_case, forgetting, forgetting_metric)
    listed = settings.pop(KEY, None)
    keys = {key: setting.value for key, setting in settings.items()}
    wanted = targets_of(targets, None if listed is None else listed.value, keys)
    own = keys.get("filter") or "none"
    rules = split_outside(filters) if filters is not None else [own]
    contenders = find_contenders(wanted, rules, keys)
    if len(contenders) == 1:
        raise ConfigError(
            f"--targets {targets!r} leaves sft with nothing to be compared with; name another target or filter"
        )
    run = build_config(settings, config)
    if run.data.validation_file is None and run.data.dataset_name is None:
        raise ConfigError(
            f"{config}: validation_file is missing; a verdict needs rows with answers that no contender is trained on"
        )
    for one in contenders:
        refuse_weighed(run, Filter.of(one.overrides.get("filter")))
    folder = output or comparison_folder(str(run.training.output_dir))
    request = Request(run, config, contenders, metrics, forgetting, folder, batch_size, max_new_tokens)
    learning_rates = tuple(float(run.training.learning_rate) * factor for factor in grid)
    plan = Plan(tuple(one.name for one in contenders), learning_rates, seeds)
    machine = Machine(seconds, at_once, engine, ray_address, begin)
    document = request.run(plan, machine, resume=resume)
    print_comparison(document, [folder / DOCUMENT, folder / PAGE])


def refuse_several(settings: Mapping[str, Setting]) -> None:
    """Raise where ``target`` is a list: before it is looked up as one name.

    Raises:
        ConfigError: it is.
    """
    from qtarget.cli.options.contenders import split_outside

    target = settings.get("target")
    if target is not None and len(split_outside(str(target.value))) > 1:
        raise ConfigError(f"target is {target.value!r}, one target of the config; --targets names those to compare")


def parse_rates(text: str) -> tuple[float, ...]:
    """Factors, 1 first if it is among them: of equals the first is taken.

    Raises:
        ConfigError: not positive numbers.

    Example:
        >>> parse_rates("0.3,1,3")
        (1.0, 0.3, 3.0)
    """
    try:
        found = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise ConfigError(f"--rates {text!r}; expected multiples of the config's learning rate, such as {RATES}")
    return tuple(sorted(found, key=lambda value: value != 1.0))


def targets_of(text: str | None, listed: Any, config: Mapping[str, Any]) -> list[Any]:
    """What ``--targets`` names, else the config's list, else the usual ones and the config's own.

    Raises:
        ConfigError: the list is none.
    """
    from qtarget.cli.options.contenders import split_outside

    if text is not None:
        return split_outside(text)
    if listed is not None:
        if not isinstance(listed, list) or not listed or not all(isinstance(one, str | dict) for one in listed):
            raise ConfigError(
                f"{KEY} is {listed!r}; expected a list of targets: names, or keys such as {{target: dft}}"
            )
        return listed
    own = config.get("target")
    usual = TARGETS.split(",")
    return usual + ([str(own)] if own and own not in usual else [])


def _metrics(
    metric: str | None, pattern: str | None, ignore_case: bool, forgetting: Path | None, other: str | None
) -> dict[SetName, Metric]:
    from qtarget.comparison.sets import Metric

    if forgetting is None and other is not None:
        raise ConfigError("--forgetting-metric judges the rows of --forgetting; name that file")
    data = Metric(metric or "exact", pattern, ignore_case, metric is not None and metric != "nll")
    data.judge()  # which says what is wrong with it before anything heavy
    if forgetting is None:
        return {"data": data}
    name = other or data.name
    second = Metric(name, pattern if name == "regex" else None, ignore_case and name in ("exact", "regex"))
    second.judge()
    return {"data": data, "forgetting": second}


def print_comparison(document: dict[str, Any], written: Sequence[Path]) -> None:
    """The table, the notes, what was left out, the verdict, and where the files are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtarget.report.comparison.document import level_words, memory_words
    from qtarget.report.comparison.verdict import Measure, amount

    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    measure = Measure(**document["measure"])
    about = document["sets"]["data"]
    table = Table(
        box=box.SIMPLE, caption=f"{about['file']}, {about['rows']:,} rows by {about['metric']}; {measure.certainty}"
    )
    for column in (
        "contender",
        "rate",
        *(["level"] if not measure.is_nll else []),
        f"to {document['baseline']}",
        "nll (less is better)",
        "forgetting",
        "s a run",
        "memory",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right", overflow="fold")
    for one in [document["base"], *document["contenders"]]:
        forgotten = one["forgetting"]["to_base"] if one["forgetting"] else None
        other = Measure(document["sets"].get("forgetting", about)["metric"], 0, 0)
        cells = (
            one["name"],
            "-" if one["best_rate"] is None else f"{one['best_rate']:g}",
            *([level_words(one["level"], measure)] if not measure.is_nll else []),
            "-" if one["to_baseline"] is None else amount(one["to_baseline"], measure),
            "-" if one["nll"] is None else f"{one['nll']:.3f}",
            "-" if forgotten is None else amount(forgotten, other, ends=False),
            f"{sum(one['seconds']) / len(one['seconds']):.1f}",
            memory_words(one["memory_bytes"]),
        )
        table.add_row(*map(Text, cells))
    console.print(table)
    for one in document["contenders"]:
        for note in one["notes"]:
            console.print(Text(f"{one['name']}: {note}", style="yellow"), soft_wrap=True)
    for line in document["left_out"]:
        console.print(Text(f"left out: {line}", style="yellow"), soft_wrap=True)
    console.print(Text(document["finding"]), soft_wrap=True)
    console.print(Text(f"wrote {', '.join(map(str, written))}"), soft_wrap=True)
