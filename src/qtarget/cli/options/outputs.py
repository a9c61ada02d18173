"""Where a verb writes its results, and how it shows that it goes on."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qtarget.core.errors import ConfigError
from qtarget.storage.files import write_atomic
from qtarget.storage.folders import CACHE, MODEL, NAMES, RUN, kind_of, refuse_overlap
from qtarget.storage.locks import locked_file

RUN_FILES = ("config.json", "*.safetensors", "tokenizer*.json", "qtarget_*", "train_summary.json", "training_args.bin")
"""What a training run leaves in its folder; a page may lie beside it."""
BEGINNINGS = {".html": (b"<!doctype html",), ".json": (b"{",), ".png": (b"\x89png",)}
OTHERWISE = (b"<!doctype html", b"{\n", b"\x89png")
"""How files begin that verbs write; one that begins otherwise was written by somebody else."""


def check_outputs(
    outputs: Mapping[str, Path | None], inputs: Iterable[str | Path | None] = (), *, replaces: bool = False
) -> None:
    """Raise before minutes are spent on results that could not be written, or that would replace what is not theirs.

    Args:
        outputs: files by the option that names them, ``--output``, ``--json``; None where none is wanted.
        inputs: files, or folders as a cache: no output may lie in one.
        replaces: a file of any sort may be written over: somebody said so.

    Raises:
        ConfigError: two outputs are one file, one is an input or in an input's folder, belongs to a model, a cache or a
            run, is a file of another sort, or it cannot be written.
    """
    taken: dict[str, str] = {}
    sources = list(inputs)
    for option, output in outputs.items():
        if output is None:
            continue
        refuse_folder(output, option)
        refuse_overlap(output, sources, option)
        name = os.path.realpath(output).casefold()  # one file where names are not told apart by case
        if name in taken:
            raise ConfigError(f"{taken[name]} and {option} are both {output}; choose two paths")
        taken[name] = option
        check_writable(output, option, replaces=replaces)


def one_writer(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that holds its ``output``, and the records beside it, while it runs: a second one is refused.

    Raises:
        ConfigError: another process writes there, or see ``check_writable``.
    """

    @functools.wraps(verb)
    def alone(*args: Any, output: Path, **options: Any) -> None:
        check_writable(output)
        with locked_file(output):
            verb(*args, output=output, **options)

    return alone


def check_writable(output: Path, option: str = "--output", *, replaces: bool = False) -> None:
    """Raise where a file could not or must not be written; what lies there stays as it is.

    Raises:
        ConfigError: the path is a folder or another's file, or its folder cannot be made or written to.
    """
    refuse_folder(output, option)
    refuse_others(output, option, replaces)
    path = Path(os.path.realpath(output))  # what a link points to
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError(f"{option} {output} cannot be written: {error}; choose another path") from error
    if not existed:
        path.unlink()


def refuse_folder(output: Path, option: str) -> None:
    """Raise for a folder where a file is wanted."""
    if output.is_dir():
        raise ConfigError(f"{option} {output} is a folder; name a file, for instance {output / 'results.json'}")


def refuse_others(output: Path, option: str, replaces: bool) -> None:
    """Raise where a file would replace what no verb of this sort wrote.

    Raises:
        ConfigError: it lies in a model or a cache, is a run's own, or begins as no such file does.
    """
    path = Path(os.path.realpath(output))
    kind = kind_of(path.parent) if path.parent.is_dir() else None
    if kind in (MODEL, CACHE):
        raise ConfigError(f"{option} {output} would lie in a folder that holds {NAMES[kind]}; choose another folder")
    if kind == RUN and path.exists() and any(path.match(name) for name in RUN_FILES):
        raise ConfigError(f"{option} {output} is the training run's own file; choose another name")
    if not replaces and path.is_file() and path.stat().st_size:
        expected = BEGINNINGS.get(path.suffix.lower(), OTHERWISE)
        with path.open("rb") as handle:
            found = handle.read(64).lstrip().lower()
        if not found.startswith(expected):
            raise ConfigError(
                f"{option} {output} is there already, and is no page, JSON or picture of qtarget's; choose another path, or "
                "delete it"
            )


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
