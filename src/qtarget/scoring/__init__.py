"""The reference cache: the frozen model is run once over the training rows; training looks its numbers up."""

from typing import TYPE_CHECKING, Any

from qtarget.scoring.cache.rows import IntArray, ScoredRow, Source

if TYPE_CHECKING:
    from qtarget.scoring.cache.merge import merge_caches
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.schema import Manifest, Provenance
    from qtarget.scoring.cache.writer import write_cache
    from qtarget.scoring.sources.local import LocalSource, score_rows

_HOMES = {
    "LocalSource": "sources.local",
    "Manifest": "cache.schema",
    "Provenance": "cache.schema",
    "ReferenceCache": "cache.reader",
    "merge_caches": "cache.merge",
    "score_rows": "sources.local",
    "write_cache": "cache.writer",
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
