"""Validation rows, chosen by prompt: rows that ask the same question are on one side."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 1000
"""Validation rows at most: the standard error of a share is then below 1.6 points."""


def prompt_of(row: Mapping[str, Any], text_field: str = "text") -> str:
    """What a row asks, as text; rows of one text belong together. Letters' case and spaces do not count.

    Args:
        row: in one of TRL's shapes. Of messages, all before the first answer count; of text, all of it; of token ids, those
            before the first label.

    Example:
        >>> prompt_of({"prompt": "2 + 2 =", "completion": "4"}) == prompt_of({"prompt": "2 + 2  = ", "completion": "5"})
        True
    """
    if row.get("input_ids") is not None:
        ids, labels = list(row["input_ids"]), row.get("labels")
        first = next((i for i, label in enumerate(labels) if label != -100), 0) if labels is not None else 0
        return json.dumps(ids[:first] if first else ids)
    if row.get("messages") is not None:
        asked = []
        for message in row["messages"]:
            if message["role"] == "assistant" and asked:
                break
            asked.append([message["role"], message.get("content")])
    else:
        asked = row["prompt"] if row.get("prompt") is not None else row[text_field]
    text = asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False, default=str)
    return " ".join(text.split()).casefold()


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
