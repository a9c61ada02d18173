"""What a server is told at its start, and what it tells of itself: plain data that fits into JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.scoring.files import write_json

WIRE_VERSION = 1
"""Of the request and answer layouts in ``wire.py``."""

IDENTITY = "identity.json"


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
            if value < lowest:
                raise ConfigError(f"limit {name} is {value}; expected at least {lowest}")


@dataclass(frozen=True)
class ServeSettings:
    """How to serve which model.

    Attributes:
        model: folder or hub name.
        loader: ``package.module:function`` from these settings to a ``Loaded``.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        device: of the forward pass; each worker moves its own copy there (on a CPU all share one).
        trust_remote_code: run code that comes with the model.
        workers: processes that score, one torch thread each.
        max_batch: requests that are scored together.
        wait_ms: how long the first of them waits for others.
        tokens_per_batch: padded tokens a forward pass; a batch is sorted by length and cut to it.
        queue: requests that may wait; beyond: 429.
        timeout: seconds a request may take, waiting included; beyond: 408.
        start_timeout: seconds until it must be ready.
        max_restarts: after crashes and hangs, within ten minutes; beyond, the server gives up.
        limits: on requests.
    """

    model: str
    loader: str = "qtarget.serving.model:load"
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    workers: int = 1
    max_batch: int = 32
    wait_ms: int = 5
    tokens_per_batch: int = 1024
    queue: int = 1024
    timeout: float = 60.0
    start_timeout: float = 600.0
    max_restarts: int = 20
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("workers", "max_batch", "wait_ms", "tokens_per_batch", "queue"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("timeout", "start_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)} seconds; expected more than 0")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}; expected at least 0")
        known = ("auto", "float32", "bfloat16", "float16")
        if self.dtype not in known:
            raise ConfigError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(known)}")

    def write(self, path: Path) -> None:
        """As JSON."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> ServeSettings:
        """What ``write`` wrote."""
        value = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**value, "limits": Limits(**value["limits"])})


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
