"""The columns of a row that mean something, by the row's shape: named here and nowhere else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

PRIVATE = "qtarget_"
"""Prefix of the columns that preparation adds; a user's own column of such a name is a note like any other."""

WEIGHTS = ("weight", "loss_weights", "weight_spans")
"""What any row may say of how much it counts."""
NOTES_READ = ("noise_spans",)
"""Read by `inspect` and by benchmarks, never by training."""
CONVERSATION = ("tools", "chat_template_kwargs")
"""Beside messages."""
TOKENS = ("labels", "completion_mask", "assistant_masks", "attention_mask")
"""Beside ``input_ids``: one entry a token."""
PACKED_ELSEWHERE = ("seq_lengths", "position_ids")
"""Beside ``input_ids``: borders of rows that somebody packed already."""
MESSAGE_KEYS = (
    *("role", "content", "weight", "tool_calls", "tool_call_id", "name", "function_call"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""What a message may hold that a template or training reads."""

GROUP_COLUMNS = ("source", "dataset", "category", "skill", "role")
"""Where rows come from, the first that is there: what differs between sources is told of each."""

IMAGES = ("image", "images", "videos", "audio")


def shapes(text_field: str = "text") -> tuple[tuple[str, ...], ...]:
    """The shapes of a row in the order in which they are tried, which is TRL's.

    Example:
        >>> shapes()
        (('input_ids',), ('prompt', 'completion'), ('messages',), ('conversations',), ('text',))
    """
    return (("input_ids",), ("prompt", "completion"), ("messages",), ("conversations",), (text_field,))


def beside(shape: Sequence[str], conversational: bool) -> tuple[str, ...]:
    """The columns that training reads beside a shape's own.

    Args:
        conversational: whether the shape's columns hold messages.

    Example:
        >>> beside(("text",), False)
        ('weight', 'loss_weights', 'weight_spans')
    """
    own = TOKENS if tuple(shape) == ("input_ids",) else CONVERSATION if conversational else ()
    return (*own, *WEIGHTS)


def misspelt(columns: Iterable[str], shape: Sequence[str], conversational: bool) -> dict[str, str]:
    """Unused columns whose names are near to one that training would read, and that name.

    Example:
        >>> misspelt(["prompt", "completion", "loss_weight", "weights", "noise_span", "source"], ("prompt", "completion"), False)
        {'loss_weight': 'loss_weights', 'weights': 'weight', 'noise_span': 'noise_spans'}
    """
    columns = list(columns)
    known = [name for name in (*beside(shape, conversational), *NOTES_READ) if name not in columns]
    return _nearest([c for c in columns if c not in (*shape, *beside(shape, conversational), *NOTES_READ)], known)


def misspelt_keys(keys: Iterable[str]) -> dict[str, str]:
    """The same for the keys of messages.

    Example:
        >>> misspelt_keys(["role", "content", "weights", "tool_call"])
        {'weights': 'weight', 'tool_call': 'tool_calls'}
    """
    keys = list(keys)
    known = [name for name in MESSAGE_KEYS if name not in keys]
    return _nearest([key for key in keys if key not in MESSAGE_KEYS], known)


def _nearest(names: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    out = {}
    for name in names:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.85)
        if near:
            out[name] = near[0]
    return out
