"""Where a verb writes its results, and how it shows that it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qtarget.errors import ConfigError
from qtarget.scoring.files import write_atomic


def check_writable(output: Path) -> None:
    """Raise before minutes are spent on results that could not be written.

    Raises:
        ConfigError: the path is a folder, or its folder cannot be made or written to.
    """
    if output.is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file, for instance {output / 'speed.json'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("a").close()
    except OSError as error:
        raise ConfigError(f"--output {output} cannot be written: {error}; choose another path") from error


def saver(output: Path) -> Callable[[Any], None]:
    """Writes results; called again and again, so that a run that is stopped loses nothing."""
    return lambda results: write_atomic(output, (json.dumps(results, indent=1) + "\n").encode())


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A function of steps done, steps in all and what was done: a bar on a terminal, else a line a call."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    console = Console()
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting")

        def advance(done: int, total: int, text: str) -> None:
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal:
                typer.echo(f"{done}/{total} {text}")

        yield advance
