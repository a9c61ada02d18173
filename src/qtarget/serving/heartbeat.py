"""How the supervisor sees that a worker died, hangs or was stopped, even inside native code, where no signal handler runs.

Every worker has a file ``STAGE-PID.beat`` of eight bytes: the monotonic second at which its current work began, or 0.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SUFFIX = ".beat"
PACKING = "<d"


class Heartbeat:
    """Of the process that makes it; a context around each piece of work."""

    def __init__(self, folder: Path, stage: str) -> None:
        self._file = os.open(folder / f"{stage}-{os.getpid()}{SUFFIX}", os.O_CREAT | os.O_RDWR, 0o600)
        self._write(0.0)

    def __enter__(self) -> Heartbeat:
        # the monotonic clock is one for all processes of a machine
        self._write(time.monotonic())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(0.0)

    def _write(self, since: float) -> None:
        # eight bytes in one call: a reader sees the old second or the new one
        os.pwrite(self._file, struct.pack(PACKING, since), 0)


@dataclass(frozen=True)
class WorkerState:
    """One worker as its file shows it.

    Attributes:
        stage: the name of its class.
        alive: the process exists and belongs to the group.
        busy_seconds: with its current work; 0 when it waits.
        path: of its file.
    """

    stage: str
    pid: int
    alive: bool
    busy_seconds: float
    path: Path


def read_heartbeats(folder: Path, group: int) -> list[WorkerState]:
    """All workers that ever were in this folder, unless their file was removed."""
    states = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        stage, pid = path.stem.rsplit("-", 1)
        content = b""
        with suppress(FileNotFoundError):
            content = path.read_bytes()
        # a file may be empty between its creation and the first write
        since = struct.unpack(PACKING, content)[0] if len(content) == struct.calcsize(PACKING) else 0.0
        busy = time.monotonic() - since if since else 0.0
        states.append(WorkerState(stage, int(pid), _is_member(int(pid), group), busy, path))
    return states


def stopped_processes(leader: int) -> set[int]:
    """Those of a process and its descendants that stand still (SIGSTOP); none where the system has no ``/proc``."""
    found, waiting = set(), [leader]
    while waiting:
        pid = waiting.pop()
        with suppress(FileNotFoundError, ProcessLookupError):
            if _state(pid) == "T":
                found.add(pid)
            waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return found


def _state(pid: int) -> str:
    """``R``, ``S``, ``T`` ... as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _is_member(pid: int, group: int) -> bool:
    """Whether the process lives (a zombie does not) in that group: process ids are used again."""
    try:
        if os.getpgid(pid) != group:
            return False
        return not Path("/proc/self/stat").exists() or _state(pid) != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
