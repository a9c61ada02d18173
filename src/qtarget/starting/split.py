"""Validation rows, chosen by prompt: rows that ask the same question are on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

MOST = 1000
"""Validation rows at most: the standard error of a share is then below 1.6 points."""


def split_rows(prompts: Sequence[str], share: float, seed: int, most: int = MOST) -> tuple[list[int], list[int]]:
    """Numbers of the training rows and of the validation rows, ascending.

    Prompts are drawn by a hash of seed and text, so the order of rows, and rows added later, move none of the others.

    Args:
        prompts: what each row asks (``prompt_of``).
        share: of the rows, to validate; 0 for none.
        seed: of the draw.
        most: validation rows at most.

    Returns:
        No validation rows where one prompt has so many rows that it fits no such share.

    Example:
        >>> split_rows(["a", "b", "a", "c"], share=0.25, seed=0)
        ([0, 1, 2], [3])
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    wanted = min(most, max(1, round(share * len(prompts)))) if share and len(groups) > 1 else 0
    drawn: list[int] = []
    for prompt in sorted(groups, key=lambda prompt: _draw(seed, prompt)):
        if len(drawn) + len(groups[prompt]) <= wanted:
            drawn += groups[prompt]
    if wanted and not drawn:
        smallest = min(groups.values(), key=len)
        drawn = smallest if 2 * len(smallest) <= len(prompts) else []
    chosen = set(drawn)
    return [i for i in range(len(prompts)) if i not in chosen], sorted(chosen)


def _draw(seed: int, prompt: str) -> bytes:
    return hashlib.blake2b(f"{seed} {prompt}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
