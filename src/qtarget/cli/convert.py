"""``qtarget convert``: rows as training takes them, in a file that people can look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qtarget.cli.options.datasets import LimitsOption
from qtarget.core.errors import ConfigError, counted


def convert(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE... OUT.jsonl", help="Files of rows, or patterns; the last is written.")
    ],
    format_name: Annotated[
        str, typer.Option("--format", help="auto, messages (openai), sharegpt, alpaca, anthropic or openviking.")
    ] = "auto",
    tools: Annotated[
        Path | None, typer.Option(help="A JSON list of tool schemas, for rows that come without theirs.")
    ] = None,
    null_content: Annotated[
        str, typer.Option(help="Rows with a message that says nothing: refuse, or drop and count them.")
    ] = "refuse",
    role: Annotated[list[str] | None, typer.Option(help="THEIRS=OURS, for a role that is not known.")] = None,
    text_field: Annotated[str, typer.Option("--dataset-text-field", help="Name of the text column.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    limits: LimitsOption = None,
) -> None:
    """Write the rows of FILE as `qtarget train` takes them, and say what was read, changed and left out."""
    from qtarget.cli.options.datasets import row_options
    from qtarget.cli.options.outputs import check_outputs
    from qtarget.data.files import expand
    from qtarget.data.loading import read_files
    from qtarget.storage.files import write_atomic

    *files, name = sources
    if not files:
        raise ConfigError(f"only {name} is named; expected qtarget convert FILE OUT.jsonl")
    output = Path(name)
    if output.suffix != ".jsonl":
        raise ConfigError(f"OUT is {output}; expected a name that ends in .jsonl, one row a line")
    paths = expand(files)
    check_outputs({"OUT": output}, [*paths, tools], replaces=True)
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; choose another OUT or pass --overwrite")
    options = row_options(
        format_name,
        null_content,
        parse_roles(role or []),
        None if tools is None else str(tools),
        limits,
        text_field=text_field,
    )
    reading = read_files(paths, options)
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in reading.rows)
    write_atomic(output, text.encode())
    for line in reading.announced:
        typer.echo(line)
    typer.echo(f"{output}: {counted(len(reading.rows), 'row')}")


def parse_roles(given: list[str]) -> dict[str, str]:
    """``THEIRS=OURS`` as a mapping.

    Raises:
        ConfigError: one has another form.

    Example:
        >>> parse_roles(["narrator=user"])
        {'narrator': 'user'}
    """
    pairs = [(theirs, ours) for theirs, _, ours in (item.partition("=") for item in given)]
    if not all(theirs and ours for theirs, ours in pairs):
        raise ConfigError(f"--role {' '.join(given)}: expected THEIRS=OURS, for instance narrator=user")
    return dict(pairs)
