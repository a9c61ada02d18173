"""Numbers of things in words."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """So many of a thing.

    Args:
        plural: of the noun, where it is not the noun with an s.

    Example:
        >>> counted(1, "row"), counted(2000, "row"), counted(0, "copy", "copies")
        ('1 row', '2,000 rows', '0 copies')
    """
    return f"{count:,} {inflected(count, noun, plural or f'{noun}s')}"


def inflected(count: int, one: str, many: str) -> str:
    """The word that goes with a number.

    Example:
        >>> inflected(1, "has", "have"), inflected(3, "has", "have")
        ('has', 'have')
    """
    return one if count == 1 else many
