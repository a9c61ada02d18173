"""Files that are whole or absent: written under a temporary name, synced, renamed.

What is no regular file (a terminal, a pipe, ``/dev/null``) is written straight; of a link, what it points to is replaced.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qtarget.core.errors import QTargetError, StorageError

TEMPORARY = ".tmp"
"""Suffix of a file under construction; whatever carries it may be deleted."""
NEXT_STEP = "free space or fix the folder, then run the same command again: what is finished is kept"
SMALL = 2**26
"""Bytes of a file that people write by hand."""
OF_WRITING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
STEPS = {
    errno.EROFS: "choose another folder",
    errno.EACCES: "choose another path, or change its permissions",
    errno.EPERM: "choose another path, or change its permissions",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit: ulimit -n 65536",
}
"""What to do where freeing space does not help."""
OF_STORAGE = OF_WRITING | STEPS.keys() | {errno.EIO, errno.ESTALE}
"""Numbers of an ``OSError`` that are about the disk, and about no mistake of the program's."""
FOREIGN_WORDS = (
    "inline_container",
    "PytorchStreamWriter",
    "iostream error",
    "I/O error",
    "os error",
    "Parent directory",
)
"""What torch and safetensors say, as a ``RuntimeError`` or their own, where the disk refused."""


@contextmanager
def writing(path: str | Path, *, text: bool = False) -> Iterator[IO[Any]]:
    """A handle on a new content of ``path``, which takes the old one's place when the block ends without an error.

    Args:
        text: UTF-8 text with plain line ends instead of bytes.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to; what was there is as it was.
    """
    path = Path(os.path.realpath(path))
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "replace", "newline": "\n"} if text else {}
    if path.exists() and not path.is_file() and not path.is_dir():
        with storage_errors(path), path.open("w" if text else "wb", **options) as handle:
            yield handle
        return
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w" if text else "wb", **options) as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk gets its space back
        raise


def sync_folder(folder: Path) -> None:
    """Make names in a folder last: a new name itself is lost in a power cut otherwise."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` so that a kill at any moment leaves the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    with writing(path) as handle:
        handle.write(content)


def write_text(path: str | Path, text: str) -> None:
    """``write_atomic`` of text as UTF-8, folders made; what UTF-8 has no bytes for becomes question marks."""
    write_atomic(Path(path), text.encode("utf-8", errors="replace"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys: equal values give equal bytes."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def append_text(path: str | Path, text: str) -> None:
    """Add ``text`` to the end of a file; where the disk refuses, the file is cut back to what it was.

    Raises:
        StorageError: see ``writing``.
    """
    path = Path(path)
    with storage_errors(path):
        before = path.stat().st_size if path.exists() else None
        try:
            with path.open("ab") as handle:
                handle.write(text.encode("utf-8", errors="replace"))
        except OSError:
            if before is not None:
                os.truncate(path, before)
            elif path.is_file():
                path.unlink()
            raise


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Name ``path`` and the next step where the disk refuses inside the block, whoever writes there.

    Raises:
        StorageError: an ``OSError``, or what torch and safetensors make of one.
    """
    try:
        yield
    except Exception as error:
        if (found := as_storage_error(error, path)) is None:
            raise
        raise found from error


def as_storage_error(error: BaseException, path: str | Path | None = None) -> StorageError | None:
    """The error in our words if it is about the disk, else nothing.

    Args:
        path: what was being written; default: what the error names.
    """
    if isinstance(error, QTargetError):
        return None
    said, verb, step = str(error), "write", NEXT_STEP
    if isinstance(error, OSError):
        if path is None and error.errno not in OF_STORAGE:
            return None
        verb = "write" if path or error.errno in OF_WRITING else "open"
        step = STEPS.get(error.errno or 0, NEXT_STEP)
        path = path or error.filename
        reason = error.strerror or said
        if error.filename and str(error.filename).removesuffix(TEMPORARY) != str(path):
            reason += f" ({error.filename})"
    elif path is not None and any(word in said for word in FOREIGN_WORDS):
        reason = f"{space_left(Path(path))}; {type(error).__name__}: {said.splitlines()[0]}"
    else:
        return None
    return StorageError(f"cannot {verb} {path or 'a file'}: {reason}; {step}")


def space_left(path: Path) -> str:
    """Free space where ``path`` is or would be, in words."""
    place = next((part for part in (path, *path.parents) if part.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    return f"{free / 1e6:,.1f} MB are free" if free > 1e5 else "the disk is full"


def read_small(path: str | Path) -> bytes:
    """A config, template, key or other file that people write; a device or a wrong file that does not end is refused.

    Raises:
        OSError: it cannot be read, or holds more than ``SMALL`` bytes.
    """
    with open(path, "rb") as handle:
        content = handle.read(SMALL + 1)
    if len(content) > SMALL:
        raise OSError(errno.EINVAL, f"more than {SMALL >> 20} MiB, which is no file of this sort", str(path))
    return content


def digest(content: bytes | memoryview) -> str:
    """BLAKE2b of some bytes, 16 bytes in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """``digest`` of a file's content, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
