"""Where a verb writes its results, whose a file there is, and how it shows that it goes on.

One rule for all verbs. A result is named after what it is of: beside the run where there is one (``runs/a-report.html`` of
``runs/a``), else in the current folder. It carries a mark of its verb and its input; only a file with the same mark is
replaced without ``--overwrite``. The last line says what was written.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qtarget.core.errors import ConfigError
from qtarget.storage.files import digest, write_atomic, write_text
from qtarget.storage.folders import CACHE, MODEL, NAMES, RUN, kind_of, refuse_overlap
from qtarget.storage.locks import locked_file

RUN_FILES = ("config.json", "*.safetensors", "tokenizer*.json", "qtarget_*", "train_summary.json", "training_args.bin")
"""What a training run leaves in its folder; a page may lie beside it."""
BEGINNINGS = {".html": (b"<!doctype html",), ".json": (b"{",), ".png": (b"\x89png",)}
OTHERWISE = (b"<!doctype html", b"{\n", b"\x89png")
"""How files begin that benchmarks write; one that begins otherwise was written by somebody else."""
MARK_WITHIN = 4096
"""Bytes from a file's beginning in which its mark stands."""
NAME_MAX = 60
"""Characters of the part of a file's name that says what it is of."""

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files there, whoever made them.")]


@dataclass(frozen=True)
class Mark:
    """Who made a file, and of what; ``str`` of it stands in the file's first bytes.

    Attributes:
        verb: as on the command line.
        source: digest of what the verb looked at, so that a page tells nothing of the machine's folders.
    """

    verb: str
    source: str

    @classmethod
    def of(cls, verb: str, sources: Iterable[str | Path | None]) -> Mark:
        """Of files and folders, whatever their spelling, and of names; in any order.

        Example:
            >>> Mark.of("lens", ["sft", "dft", None]) == Mark.of("lens", ["dft", "sft"])
            True
        """
        named = {str(one) for one in sources if one is not None}
        # a path that is nowhere yet, as of a run to come, may be there at the next call
        paths = {one for one in named if os.sep in one or os.path.exists(one)}
        places = sorted({os.path.realpath(one) for one in paths} | (named - paths))
        return cls(verb, digest(json.dumps(places).encode()))

    def __str__(self) -> str:
        return f"qtarget {self.verb} of {self.source}"

    def page(self, html: str) -> str:
        """A page with the mark behind its doctype."""
        return html.replace("<!doctype html>", f"<!doctype html>\n<!-- made by {self} -->", 1)

    def numbers(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A document with the mark before all else."""
        return {"made_by": str(self)} | dict(document)

    def owns(self, path: Path) -> bool:
        """Whether a file carries it."""
        return str(self).encode() in beginning(path)


def beginning(path: Path) -> bytes:
    """The first bytes of a file."""
    with path.open("rb") as handle:
        return handle.read(MARK_WITHIN)


def write_page(path: Path, html: str, mark: Mark) -> None:
    """One HTML file, marked."""
    write_text(path, mark.page(html))


def write_numbers(path: Path, document: Mapping[str, Any], mark: Mark) -> None:
    """One JSON file, marked."""
    write_text(path, json.dumps(mark.numbers(document), indent=1, allow_nan=False) + "\n")


def say_written(paths: Iterable[Path | None]) -> None:
    """The last line of a verb."""
    typer.echo("wrote " + ", ".join(str(path) for path in paths if path is not None))


def beside_runs(runs: Sequence[Path], ending: str) -> Path:
    """Beside the first run, named after all.

    Example:
        >>> str(beside_runs([Path("runs/sft"), Path("runs/dft")], "report.html"))
        'runs/sft+dft-report.html'
        >>> str(beside_runs([Path("runs/sft/checkpoint-8")], "evaluation.json"))
        'runs/sft-checkpoint-8-evaluation.json'
    """
    paths = [path if path.name.strip(".") else path.resolve() for path in runs]
    inner = paths[0].name.startswith("checkpoint-") and bool(paths[0].parent.name)
    folder = paths[0].parent.parent if inner else paths[0].parent
    return folder / named_after([_run_name(path) for path in paths], ending)


def _run_name(path: Path) -> str:
    if path.name.startswith("checkpoint-") and path.parent.name:
        return f"{path.parent.name}-{path.name}"
    return path.name


def named_after(names: Sequence[str], ending: str) -> str:
    """A file's name that says what it is of.

    Example:
        >>> named_after(["sft", "p_power(alpha=0.3)"], "lens.html")
        'sft+p_power_alpha=0.3-lens.html'
    """
    words = [re.sub(r"[^\w.=-]+", "_", name).strip("_.-") or "it" for name in names]
    joined = "+".join(words)
    if len(joined) > NAME_MAX:
        joined = words[0][:NAME_MAX] + (f"+{len(words) - 1}-more" if len(words) > 1 else "")
    return f"{joined}-{ending}"


def check_outputs(
    outputs: Mapping[str, Path | None],
    inputs: Iterable[str | Path | None] = (),
    *,
    mark: Mark | None = None,
    replaces: bool = False,
) -> None:
    """Raise before minutes are spent on results that could not be written, or that would replace what is not theirs.

    Args:
        outputs: files by the option that names them, ``--output``, ``--json``; None where none is wanted.
        inputs: files, or folders as a cache: no output may lie in one.
        mark: what the outputs will carry; a file that is there must carry it too. None for a verb whose files carry none.
        replaces: a file of any sort may be written over: somebody said so.

    Raises:
        ConfigError: two outputs are one file, one is an input or in an input's folder, belongs to a model, a cache or a
            run, is there and of somebody else, or it cannot be written.
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
        check_writable(output, option, mark=mark, replaces=replaces)


def one_writer(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that holds its ``output``, and the records beside it, while it runs: a second one is refused.

    Raises:
        ConfigError: another process writes there, or see ``check_writable``.
    """

    @functools.wraps(verb)
    def alone(*args: Any, output: Path, **options: Any) -> None:
        with held(output):
            verb(*args, output=output, **options)

    return alone


@contextmanager
def held(output: Path, *, mark: Mark | None = None, replaces: bool = False) -> Iterator[None]:
    """Hold an output, and what lies beside it under its name.

    Raises:
        ConfigError: another process writes there, or see ``check_writable``.
    """
    check_writable(output, mark=mark, replaces=replaces)
    with locked_file(output):
        yield


def check_writable(output: Path, option: str = "--output", *, mark: Mark | None = None, replaces: bool = False) -> None:
    """Raise where a file could not or must not be written; what lies there stays as it is.

    Raises:
        ConfigError: the path is a folder or another's file, or its folder cannot be made or written to.
    """
    refuse_folder(output, option)
    refuse_others(output, option)
    if not replaces:
        refuse_existing(output, option, mark)
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


def refuse_others(output: Path, option: str) -> None:
    """Raise where a file would lie in a model or a cache, or is a run's own."""
    path = Path(os.path.realpath(output))
    kind = kind_of(path.parent) if path.parent.is_dir() else None
    if kind in (MODEL, CACHE):
        raise ConfigError(f"{option} {output} would lie in a folder that holds {NAMES[kind]}; choose another folder")
    if kind == RUN and path.exists() and any(path.match(name) for name in RUN_FILES):
        raise ConfigError(f"{option} {output} is the training run's own file; choose another name")


def refuse_existing(output: Path, option: str, mark: Mark | None) -> None:
    """Raise where a file is there that the same verb did not make of the same input; without a mark, one of another sort."""
    path = Path(os.path.realpath(output))
    if not path.is_file() or not path.stat().st_size:
        return
    if mark is None:
        expected = BEGINNINGS.get(path.suffix.lower(), OTHERWISE)
        if not beginning(path).lstrip().lower().startswith(expected):
            raise ConfigError(
                f"{option} {output} is there already, and is no page, JSON or picture of qtarget's; choose another path, or "
                "delete it"
            )
    elif not mark.owns(path):
        raise ConfigError(
            f"{option} {output} is there already, and `qtarget {mark.verb}` did not make it of this input; choose another "
            f"{option}, or pass --overwrite"
        )


def saver(output: Path) -> Callable[[Any], None]:
    """Writes results; called again and again, so that a run that is stopped loses nothing."""
    return lambda results: write_atomic(output, (json.dumps(results, indent=1) + "\n").encode())


@contextmanager
def progress_bar(every: float = 0.0) -> Iterator[Callable[[int, int, str], None]]:
    """A function of steps done, steps in all and what was done: a bar on a terminal, else lines.

    Args:
        every: seconds between two lines at least, where there is no terminal; the first and the last step always have theirs.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

    console = Console()
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:3], TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, said = bar.add_task("starting"), -math.inf

        def advance(done: int, total: int, text: str) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal and (done == total or time.monotonic() - said >= every):
                said = time.monotonic()
                typer.echo(f"{done}/{total} {text}")

        yield advance
