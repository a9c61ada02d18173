"""Numbers of things in words."""

from __future__ import annotations

IRREGULAR = {"have": "has", "are": "is", "do": "does", "were": "was"}


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """So many of a thing.

    Args:
        plural: of the noun, where it is not the noun with an s.

    Example:
        >>> counted(1, "row"), counted(2000, "row"), counted(0, "copy", "copies")
        ('1 row', '2,000 rows', '0 copies')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def inflected(count: int, verb: str) -> str:
    """What so many things do.

    Args:
        verb: of several, in the present.

    Example:
        >>> inflected(1, "have"), inflected(3, "have"), inflected(1, "hold")
        ('has', 'have', 'holds')
    """
    return verb if count != 1 else IRREGULAR.get(verb, f"{verb}s")
