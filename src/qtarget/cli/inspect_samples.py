"""``qtarget inspect RUN``: the samples that a run of ``qtarget rl`` kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from qtarget.core.errors import ConfigError, counted

KNOWN = ("config", "targets", "output", "json_file", "rows", "overwrite")


def inspect_samples(
    context: typer.Context,
    path: Path,
    targets: str | None,
    output: Path | None,
    json_file: Path | None,
    rows: int,
    overwrite: bool,
) -> None:
    """Write the page of the samples.

    Args:
        path: of the run's folder, or of the file of samples in it.
        targets: trust regions under which they are weighed, too.
        rows: samples in full, at most.

    Raises:
        ConfigError: an option that has no meaning here, or a target that samples cannot show.
        DataError: no samples.
    """
    from qtarget.cli.options.contenders import named_targets
    from qtarget.cli.options.outputs import (
        Mark,
        beside_runs,
        check_outputs,
        named_after,
        say_written,
        write_numbers,
        write_page,
    )
    from qtarget.report.runs.records import ROLLOUTS_FILE, is_run
    from qtarget.report.runs.rollouts import check_region, rollouts_document, rollouts_page

    refuse_others(context)
    found = {} if targets is None else named_targets(targets, {})
    for name, target in found.items():
        check_region(name, target)
    samples = path / ROLLOUTS_FILE if path.is_dir() else path
    if output is None:  # a file of samples that was moved out of its run is named after itself
        run = path if path.is_dir() else path.absolute().parent
        of_run = path.is_dir() or is_run(run)
        output = beside_runs([run], "inspect.html") if of_run else Path(named_after([path.stem], "inspect.html"))
    mark = Mark.of("inspect", [samples])
    check_outputs({"--output": output, "--json": json_file}, [samples], mark=mark, replaces=overwrite)
    document = rollouts_document(path, found, rows)
    write_page(output, rollouts_page(document), mark)
    if json_file is not None:
        write_numbers(json_file, document, mark)
    for one in document["summary"]:
        typer.echo(said_of(one))
    typer.echo(counted(document["count"], "sample"))
    say_written([output, json_file])


def said_of(region: Mapping[str, Any]) -> str:
    """One line about what a rule makes of the samples.

    Example:
        >>> said_of({"region": "spo", "tokens": 0, "mean": None, "blocked": None, "corrective": None})
        'spo: no token has an advantage'
    """
    if not region["tokens"]:
        return f"{region['region']}: no token has an advantage"
    shares = f"mean weight {region['mean']:.3f}, blocked {region['blocked']:.1%}, corrective {region['corrective']:.1%}"
    return f"{region['region']}: {region['tokens']:,} tokens with an advantage, {shares}"


def refuse_others(context: typer.Context) -> None:
    """Samples are as the run kept them: there is no model to run and no data set to look at.

    Raises:
        ConfigError: names what was given for those.
    """
    from qtarget.cli.options.settings import is_said

    given = [f"--{name.replace('_', '-')}" for name in context.params if name not in KNOWN and is_said(context, name)]
    if given or context.args:
        named = " ".join([*given, *context.args])
        raise ConfigError(
            f"{named}: not with samples of a run; expected --targets, --rows, --output, --json and --overwrite at most"
        )
