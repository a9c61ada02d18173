"""A number a row beside a cross-fitted cache: by how much another row's prompt makes an answer likelier than its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qtarget.core.errors import CacheMismatchError
from qtarget.scoring.cache.schema import MANIFEST
from qtarget.storage.files import digest, write_atomic

COPIES = ".copies"
"""Folder of trained copies inside a cross-fit that is not finished; it goes when all is asked, the numbers beside it too."""
SIDE = "contradiction.npz"
"""Of a cross-fit's folder: ``checksums`` of its rows in order, ``values`` in nats, and the digest of the manifest it is of."""


def write_side(directory: Path, checksums: Sequence[str], values: np.ndarray) -> None:
    """Write a row's number each, for a finished cache."""
    names = np.array([checksum.encode() for checksum in checksums], dtype="S32")
    order = np.argsort(names, kind="stable")
    content = io.BytesIO()
    np.savez_compressed(
        content,
        checksums=names[order],
        values=np.asarray(values, np.float32)[order],
        manifest=np.array(_manifest(directory)),
    )
    write_atomic(directory / SIDE, content.getvalue())


def read_side(directory: Path, checksums: Sequence[str]) -> np.ndarray | None:
    """The numbers of some rows, nats; None where the cache has none.

    Raises:
        CacheMismatchError: the file is damaged, is of another cache, or lacks a row.
    """
    path = directory / SIDE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as found:
            names, values, manifest = found["checksums"], found["values"], str(found["manifest"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CacheMismatchError(
            f"{path} cannot be read ({error}); delete it, or cross-fit into a new folder"
        ) from error
    if manifest != _manifest(directory):
        raise CacheMismatchError(f"{path} is of another cache; delete it, or cross-fit into a new folder")
    wanted = np.array([checksum.encode() for checksum in checksums], dtype="S32")
    places = np.minimum(np.searchsorted(names, wanted), len(names) - 1)
    if (missing := names[places] != wanted).any():
        raise CacheMismatchError(f"{path} lacks {int(missing.sum())} rows; delete it, or cross-fit into a new folder")
    return values[places].astype(np.float64)


def _manifest(directory: Path) -> str:
    return digest((directory / MANIFEST).read_bytes())
