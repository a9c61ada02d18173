"""What a qtarget server tells of itself: which model, and the most that may be asked at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qtarget.core.errors import ConfigError

WIRE_VERSION = 1
"""Of the request and answer layouts in ``wire.py``."""


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
            KeyError, TypeError, ConfigError: fields are missing, unknown or wrong.
        """
        return cls(**{**value, "limits": Limits(**value["limits"])})
