"""One writer a folder, or a file: a lock file that says who holds it, and that the next process takes over from a dead one.

The file is made with ``O_EXCL``, which every file system has that ``flock`` has not. It names the process (number, and the
moment it began, for numbers are given out again) and the machine. On the machine itself the process is looked for. From
another machine, or another container, the owner is known to live by its heartbeat: it touches the file every ``BEAT``
seconds, and one that does not for ``SILENCE`` seconds is taken for dead. The file system's own clock is read, so clocks
of machines may differ.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError, StorageError
from qtarget.storage.files import storage_errors

LOCK = ".lock"
BEAT, SILENCE = 10.0, 60.0
"""Seconds between two signs of life, and without one until a process elsewhere is taken for dead."""
GRACE = 5.0
"""Seconds in which a lock file may be without its content: it is just being written."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Attributes:
        host: the machine's name, for people.
        place: boot and process namespace: process numbers of one place can be compared.
        pid, began: process number, and when it began, in the kernel's ticks; empty where no kernel tells.
        token: of this one holding.
    """

    host: str
    place: str
    pid: int
    began: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextmanager
def locked(folder: str | Path, *, again: bool = False) -> Iterator[None]:
    """Hold a folder's lock; whatever ends the process, the next one may take it.

    Args:
        again: go on where this very thread holds it already.

    Raises:
        ConfigError: another process or thread holds it.
        StorageError: the folder cannot be written to.
    """
    with _holding(Path(folder).resolve() / LOCK, again=again):
        yield


@contextmanager
def locked_file(output: str | Path) -> Iterator[None]:
    """Hold one file of results, and what is written beside it; others in the folder are free.

    Raises:
        ConfigError: another process holds it.
        StorageError: its folder cannot be written to.
    """
    path = Path(output).resolve()
    with _holding(path.with_name(f"{LOCK}.{path.name}")):
        yield


@contextmanager
def _holding(path: Path, *, again: bool = False) -> Iterator[None]:
    mine = (str(path), threading.get_ident())
    if again and mine in _held:
        yield
        return
    owner = acquire(path)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, owner, stop), name="qtarget-lock", daemon=True)
    _held.add(mine)
    beat.start()
    try:
        yield
    finally:
        _held.discard(mine)
        stop.set()
        beat.join()
        if os.getpid() == owner.pid and read_owner(path) == owner:  # a fork leaves its parent's lock alone
            path.unlink(missing_ok=True)


_held: set[tuple[str, int]] = set()


def acquire(path: Path) -> Owner:
    """Make the lock file ours, or say whose it is. It may take ``SILENCE`` seconds to see that a far owner is dead.

    Raises:
        ConfigError: it is held.
        StorageError: the folder cannot be written to.
    """
    owner = Owner(platform.node(), _place(), os.getpid(), began(os.getpid()), uuid.uuid4().hex)
    while True:
        with storage_errors(path):
            if _create(path, owner):
                return owner
        found = _watch(path)
        if isinstance(found, Owner):
            raise ConfigError(
                f"another process is writing {_held_by(path)}: {found}; expected one at a time; wait for it, or choose "
                f"another {'folder' if path.name == LOCK else 'file'}"
            )
        if found is not None:
            _remove(path, found)


def _held_by(path: Path) -> Path:
    """The folder or file that a lock is of."""
    return path.parent if path.name == LOCK else path.with_name(path.name.removeprefix(f"{LOCK}."))


def _create(path: Path, owner: Owner) -> bool:
    """Whether the file is ours now; it is not where there is one already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, json.dumps(asdict(owner)).encode())
        os.fsync(handle)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def _watch(path: Path) -> Owner | bytes | None:
    """The owner if it lives, the content of a dead one's file, None if the file is gone."""
    first = _look(path)
    if first is None:
        return None
    content, beat = first
    owner = _parse(content)
    if owner is not None and owner.place == _place():
        alive = owner.pid == os.getpid() or (is_running(owner.pid) and began(owner.pid) == owner.began)
        return owner if alive else content
    limit = GRACE if owner is None else SILENCE
    if _now(path.parent) - beat > limit:
        return content
    end = time.monotonic() + limit
    logger.warning("%s is held by %s; waiting %.0f s at most for a sign of life", path, owner or "somebody", limit)
    while time.monotonic() < end:
        time.sleep(min(1.0, limit / 4))
        again = _look(path)
        if again is None:
            return None
        if again != (content, beat):
            return _parse(again[0]) or _watch(path)
    return content


def _look(path: Path) -> tuple[bytes, float] | None:
    """Content and time of change; opened, for a network file system looks anew only then."""
    try:
        with path.open("rb") as handle:
            return handle.read(), os.fstat(handle.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Owner | None:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def read_owner(path: Path) -> Owner | None:
    """Who holds a lock file; None where there is none, or none that can be read."""
    found = _look(path)
    return None if found is None else _parse(found[0])


def _remove(path: Path, dead: bytes) -> None:
    """Delete a dead owner's file and no other: of two that saw it, the slower one finds the faster one's in its place."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError), storage_errors_but_missing(path):
        os.rename(path, aside)
        if aside.read_bytes() != dead:
            with suppress(OSError):
                os.link(aside, path)
        else:
            logger.warning("%s: its process is gone (%s); taken over", path, _parse(dead) or "an earlier version's")
        aside.unlink()


@contextmanager
def storage_errors_but_missing(path: Path) -> Iterator[None]:
    """``storage_errors`` that lets ``FileNotFoundError`` through."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"cannot take over the lock {path}: {error}; delete it") from error


def _now(folder: Path) -> float:
    """The time by the file system's clock."""
    probe = folder / f"{LOCK}.{uuid.uuid4().hex}"
    with storage_errors(probe):
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def _beat(path: Path, owner: Owner, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        found = read_owner(path)
        if found != owner:
            logger.error("the lock %s was taken from this process by %s; two may be writing there", path, found)
            return
        with suppress(OSError):
            os.utime(path)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number here, also somebody else's; one that only waits to be collected is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] != ["Z"]


def began(pid: int) -> str:
    """When a process began, in ticks since the machine's start; empty where the kernel has no /proc."""
    fields = _stat(pid)
    return fields[19] if len(fields) > 19 else ""


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on: the name before it may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _place() -> str:
    parts: list[Any] = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
