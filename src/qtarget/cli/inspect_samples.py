"""``qtarget inspect RUN``: the samples that a run of ``qtarget rl`` kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from qtarget.core.errors import ConfigError

KNOWN = ("config", "targets", "output", "json_file", "rows")


def inspect_samples(
    context: typer.Context, path: Path, targets: str | None, output: Path, json_file: Path | None, rows: int
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
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.report.runs.records import ROLLOUTS_FILE
    from qtarget.report.runs.rollouts import check_region, rollouts_document, rollouts_page
    from qtarget.storage.files import write_text

    refuse_others(context)
    found = {} if targets is None else named_targets(targets, {})
    for name, target in found.items():
        check_region(name, target)
    check_outputs({"--output": output, "--json": json_file}, [path / ROLLOUTS_FILE if path.is_dir() else path])
    document = rollouts_document(path, found, rows)
    write_text(output, rollouts_page(document))
    if json_file is not None:
        write_text(json_file, json.dumps(document, indent=1, allow_nan=False) + "\n")
    for one in document["summary"]:
        typer.echo(said_of(one))
    typer.echo(f"{output}: {document['count']:,} samples")


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
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        # by its name: typer 0.27 may bring a click of its own
        if name not in KNOWN and getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]
    if given or context.args:
        named = " ".join([*given, *context.args])
        raise ConfigError(
            f"{named}: not with samples of a run; expected --targets, --rows, --output and --json at most"
        )
