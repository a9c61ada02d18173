"""What a row asks: rows that ask the same are drawn, split and judged together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.data.overlap import content_hash


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


def questions_of(rows: Sequence[Mapping[str, Any]], text_field: str = "text") -> list[str]:
    """What makes rows belong together: their prompts; where all share one, which tells nothing apart, their contents.

    Example:
        >>> questions_of([{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}])
        ['a', 'b']
        >>> one, same, other = questions_of([{"prompt": "", "completion": c} for c in "112"])
        >>> one == same, one == other
        (True, False)
    """
    prompts = [prompt_of(row, text_field) for row in rows]
    if len(set(prompts)) > 1:
        return prompts
    return [content_hash(row, text_field).hex() for row in rows]
