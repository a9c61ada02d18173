"""What a qtarget server tells of itself: which model, and the most that may be asked at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from qtarget.core.errors import ConfigError

WIRE_VERSION = 1
"""Of the request and answer layouts in ``wire.py``."""

LONGEST_TEXT = 4096
"""Characters of a name or version that a server tells."""


@dataclass(frozen=True)
class Limits:
    """The most a request may ask for; beyond: 413 for the body, else 422.

    Attributes:
        body_bytes: of a request.
        rows: a request.
        row_tokens: of one row; 0 for the model's own maximum (at the end it is never 0).
        tokens: of all rows of a request.
        top_k: log-probs a position.
        candidates: ids a request.
        answer_bytes: that the answer would have.
    """

    body_bytes: int = 2**20
    rows: int = 64
    row_tokens: int = 0
    tokens: int = 2**16
    top_k: int = 1024
    candidates: int = 1024
    answer_bytes: int = 2**26

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = 0 if name in ("row_tokens", "top_k", "candidates") else 1
            if type(value) is not int or not lowest <= value < 2**31:
                raise ConfigError(f"limit {name} is {value!r}; expected a whole number from {lowest} to {2**31 - 1}")


@dataclass(frozen=True)
class Identity:
    """``GET /info``: who answers, so that clients and caches can refuse a mismatch.

    Attributes:
        model_id, model_fingerprint, tokenizer_fingerprint, chat_template_fingerprint, vocab_size, dtype, versions: as in
            a cache's manifest.
        limits: with ``row_tokens`` of the model.
        canary_ids, canary_log_probs: a row, and the log-probs of its tokens after the first as the model gave them
            before any server was around it.
    """

    model_id: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    vocab_size: int
    dtype: str
    versions: dict[str, str]
    limits: Limits
    canary_ids: list[int]
    canary_log_probs: list[float]
    engine: str = "qtarget"
    wire_version: int = WIRE_VERSION

    @classmethod
    def parse(cls, value: dict[str, Any]) -> Identity:
        """From JSON.

        Raises:
            KeyError, TypeError, ValueError: fields are missing, unknown or wrong.
        """
        found = cls(**{**value, "limits": Limits(**value["limits"])})
        texts = {field.name for field in fields(cls) if field.type == "str"}
        wrong = {name for name in texts if not _is_text(getattr(found, name))}
        versions = found.versions if isinstance(found.versions, dict) else {}
        if "qtarget" not in versions or not all(map(_is_text, [*versions, *versions.values()])):
            wrong.add("versions")
        if type(found.vocab_size) is not int or not 1 <= found.vocab_size < 2**31:
            wrong.add("vocab_size")
        elif not _are(found.canary_ids, (int,), 0, found.vocab_size - 1) or not found.canary_ids:
            wrong.add("canary_ids")
        elif not _are(found.canary_log_probs, (int, float), -math.inf, 1.0):
            wrong.add("canary_log_probs")
        if not found.limits.row_tokens:
            wrong.add("limits.row_tokens")
        if wrong:
            raise ValueError(f"wrong {', '.join(sorted(wrong))}")
        return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_TEXT


def _are(values: Any, kinds: tuple[type, ...], lowest: float, highest: float) -> bool:
    return isinstance(values, list) and all(type(v) in kinds and lowest <= v <= highest for v in values)
