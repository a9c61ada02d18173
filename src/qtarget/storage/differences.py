"""What differs between what a file says and what is asked for now, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 60
"""Characters of a value in a message."""


def differences(known: Any, now: Any, name: str = "") -> list[str]:
    """What differs in two JSON values, in words, by its dotted key.

    Example:
        >>> differences({"settings": {"max_steps": "20"}, "rows": 1}, {"settings": {"max_steps": "21", "bf16": "True"}, "rows": 1})
        ['settings.max_steps was 20 and is 21', 'settings.bf16 was not set and is True']
    """
    if known == now:
        return []
    if isinstance(known, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in {**known, **now}
            for line in differences(known.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [f"{name} was {_shown(known)} and is {_shown(now)}"]


def _shown(value: Any) -> str:
    """Short; a whole list says little."""
    text = "not set" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
