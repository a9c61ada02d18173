"""Rows that are trained and validated both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from qtarget.data.fields import CONVERSATION, TOKENS

CONTENT = ("input_ids", *TOKENS, "messages", "prompt", "completion", *CONVERSATION)
NAMED = 5


def content_hash(row: Mapping[str, Any], text_field: str = "text") -> bytes:
    """A hash of what a row trains: not of its notes, nor of the order of keys.

    Args:
        row: in one of TRL's shapes.
        text_field: name of the text column.

    Example:
        >>> content_hash({"prompt": "a", "completion": "b", "id": 1}) == content_hash({"completion": "b", "prompt": "a"})
        True
        >>> content_hash({"input_ids": [5, 6], "completion_mask": [0, 1]}) == content_hash({"input_ids": [5, 6]})
        False
    """
    kept = {name: row[name] for name in (*CONTENT, text_field) if row.get(name) not in (None, {}, [])}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_hashes(rows: Iterable[Any], text_field: str = "text") -> frozenset[bytes]:
    """Of all rows; see ``content_hash``."""
    return frozenset(content_hash(row, text_field) for row in rows)


def shared_rows(train: Iterable[Any], validation: Iterable[Any], *, text_field: str = "text") -> list[str]:
    """A warning that counts and names the validation rows which are training rows too; nothing where there are none.

    Example:
        >>> (line,) = shared_rows([{"text": "a"}, {"text": "b"}], [{"text": "b"}])
        >>> line.split(";")[0]
        '1 of 1 validation rows is a training row too: validation row 1 is training row 2'
    """
    known: dict[bytes, int] = {}
    for i, row in enumerate(train):
        known.setdefault(content_hash(row, text_field), i)
    hashes = [content_hash(row, text_field) for row in validation]
    found = [(j, known[value]) for j, value in enumerate(hashes) if value in known]
    if not found:
        return []
    named = ", ".join(f"validation row {j + 1} is training row {i + 1}" for j, i in found[:NAMED])
    are = "is a training row" if len(found) == 1 else "are training rows"
    return [
        f"{len(found):,} of {len(hashes):,} validation rows {are} too: {named}{', ...' * (len(found) > NAMED)}; their loss "
        "says what was learned by heart, so remove them from one of the two"
    ]
