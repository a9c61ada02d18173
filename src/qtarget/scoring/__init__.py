"""The reference cache: the frozen model is run once over the training rows; training looks its numbers up."""

from typing import TYPE_CHECKING, Any

from qtarget.scoring.rows import IntArray, ScoredRow, Source

if TYPE_CHECKING:
    from qtarget.scoring.local import LocalSource, score_rows
    from qtarget.scoring.merge import merge_caches
    from qtarget.scoring.reader import ReferenceCache
    from qtarget.scoring.schema import Manifest, Provenance
    from qtarget.scoring.writer import write_cache

_HOMES = {
    "LocalSource": "local",
    "Manifest": "schema",
    "Provenance": "schema",
    "ReferenceCache": "reader",
    "merge_caches": "merge",
    "score_rows": "local",
    "write_cache": "writer",
}

__all__ = [
    "IntArray",
    "LocalSource",
    "Manifest",
    "Provenance",
    "ReferenceCache",
    "ScoredRow",
    "Source",
    "merge_caches",
    "score_rows",
    "write_cache",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: a reader needs no model, and the protocol neither pyarrow."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
