"""Command lines in forked children of one process that has imported everything: what each said, cost and ended with."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = resource.getpagesize()
ROOM = 4 * 2**30
"""Bytes of address space that a child may take beyond its parent's."""
HUNG = 30
"""Seconds until a child is ended."""
DIED = 70
"""Exit code of a child out of which an exception came."""
Before = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """One command line that has ended.

    Attributes:
        code: exit code; minus the number of the signal that ended it.
        seconds: wall clock, without the imports.
        cpu_seconds: the processor's, of the child and of what it started and awaited.
        mib: largest resident memory beyond what the child began with.
        text: standard output and error, together.
    """

    code: int
    seconds: float
    cpu_seconds: float
    mib: float
    text: str


def import_everything() -> None:
    """What children share; they start no threads here, so a fork is safe."""
    for name in ("transformers", "trl", "datasets", "peft", "matplotlib.pyplot", "transformers.models.llama"):
        importlib.import_module(name)
    import qtarget

    for found in pkgutil.walk_packages(qtarget.__path__, "qtarget."):
        if not found.name.endswith((".main", ".triton", ".ray")):
            with contextlib.suppress(Exception):
                importlib.import_module(found.name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page


def run_all(
    commands: Sequence[Sequence[str]], folder: Path, at_once: int = 2, before: Before | None = None
) -> Iterator[tuple[int, Ended]]:
    """Run command lines of ``qtarget``, some at once; pairs of number and end, in the order in which they end.

    Args:
        folder: for what the children write where no place is named: their working folders and temporary files.
        before: called in each child first, to set limits.
    """
    waiting, running = list(enumerate(commands)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, command = waiting.pop(0)
            place = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=folder))
            running[start(command, place, before)] = (number, place, time.monotonic())
        pid, status, used = os.wait4(-1, 0)
        if pid not in running:
            continue
        number, place, begin = running.pop(pid)
        yield number, ended(pid, status, used, place, begin)


def run_one(command: Sequence[str], folder: Path, before: Before | None = None) -> Ended:
    """Run one command line."""
    ((_, found),) = run_all([command], folder, 1, before)
    return found


def start(command: Sequence[str], place: Path, before: Before | None = None) -> int:
    """Fork a child that runs a command line, in a session of its own; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = DIED
    try:
        os.setsid()
        prepare(place)
        if before is not None:
            before()
        code = run(command)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def prepare(place: Path) -> None:
    """Output into files, limits, a working folder."""
    (place / "work").mkdir()
    (place / "begun").write_text(str(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE))
    out = os.open(place / "text", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(place / "work")
    tempfile.tempdir = os.environ["TMPDIR"] = str(place)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CPU, (HUNG, HUNG))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(HUNG)


def run(command: Sequence[str]) -> int:
    """The command line, as the installed program runs it; its exit code."""
    from qtarget.cli.main import run as run_command_line

    try:
        run_command_line(list(command))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def ended(pid: int, status: int, used: resource.struct_rusage, place: Path, begin: float) -> Ended:
    """What a child left; what it started is ended with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    begun = place / "begun"
    mib = (used.ru_maxrss * 1024 - int(begun.read_text() if begun.exists() else 0)) / 2**20
    said = place / "text"
    text = said.read_text(encoding="utf-8", errors="replace") if said.exists() else ""
    seconds, cpu = round(time.monotonic() - begin, 2), round(used.ru_utime + used.ru_stime, 2)
    return Ended(os.waitstatus_to_exitcode(status), seconds, cpu, round(max(mib, 0.0), 1), text)
