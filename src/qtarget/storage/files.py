"""Files that are whole or absent: written under a temporary name, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qtarget.core.errors import StorageError

TEMPORARY = ".tmp"
"""Suffix of a file under construction; whatever carries it may be deleted."""


def write_atomic(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` so that a kill at any moment leaves the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself is lost in a power cut otherwise
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)  # a full disk gets its space back
        raise StorageError(
            f"cannot write {path} ({len(content):,} bytes): {error}; free space or fix the folder, then run the same "
            "command again: what is finished is kept"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON with sorted keys: equal values give equal bytes."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def digest(content: bytes | memoryview) -> str:
    """BLAKE2b of some bytes, 16 bytes in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """``digest`` of a file's content, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
