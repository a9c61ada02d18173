"""Where a verb writes its results, and how it shows that it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qtarget.core.errors import ConfigError
from qtarget.storage.files import write_atomic


def check_outputs(outputs: Mapping[str, Path | None], inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise before minutes are spent on results that could not be written, or that would replace what they are made from.

    Args:
        outputs: files by the option that names them, ``--output``, ``--json``; None where none is wanted.
        inputs: files, or folders as a cache: no output may lie in one.

    Raises:
        ConfigError: two outputs are one file, one is an input or in an input's folder, or it cannot be written.
    """
    taken: dict[Path, str] = {}
    sources = [Path(path).resolve() for path in inputs if path is not None]
    for option, output in outputs.items():
        if output is None:
            continue
        path = output.resolve()
        for source in sources:
            if path == source or source in path.parents:
                where = "is" if path == source else "lies in"
                raise ConfigError(f"{option} {output} {where} {source}, which is read here; choose another path")
        if path in taken:
            raise ConfigError(f"{taken[path]} and {option} are both {output}; choose two paths")
        taken[path] = option
        check_writable(output, option)


def check_writable(output: Path, option: str = "--output") -> None:
    """Raise where a file could not be written; what lies there stays as it is.

    Raises:
        ConfigError: the path is a folder, or its folder cannot be made or written to.
    """
    if output.is_dir():
        raise ConfigError(f"{option} {output} is a folder; name a file, for instance {output / 'results.json'}")
    path = output.resolve()  # what a link points to
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{option} {output} cannot be written: {error}; choose another path") from error
    if not existed:
        path.unlink()


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
