"""The three stages of the pipeline, as mosec's workers.

``Ingest`` checks one request at a time: in a batched stage one bad request would fail its neighbours. ``Score`` runs the
model on a batch. ``Egress`` writes one answer at a time, so that a failed request fails alone.
"""

from __future__ import annotations

import hmac
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mosec import ClientError, ServerError, ValidationError, Worker  # pyright: ignore[reportMissingImports]

from qtarget.core.errors import DataError, HyperparameterError
from qtarget.scoring.cache.rows import ScoredRow, Source
from qtarget.scoring.sources.wire import CONTENT_TYPE, MalformedError, Wanted, pack_answer, unpack_request
from qtarget.serving.heartbeat import Heartbeat
from qtarget.serving.model import Loaded

FAILED = "scoring failed; the server's log says why"
"""All that a client learns of a fault of ours: the text of an exception may hold paths and settings."""

logger = logging.getLogger(__name__)


@dataclass
class Context:
    """What workers inherit when they are forked: set once by ``pipeline.py``.

    Attributes:
        loaded: the model.
        folder: for heartbeats.
        secret: the gateway begins each body with it; other processes of this machine cannot.
    """

    loaded: Loaded
    folder: Path
    secret: bytes


class Stage(Worker):
    """A worker with a heartbeat around its work."""

    context: Context
    resp_mime_type = CONTENT_TYPE

    def __init__(self) -> None:
        super().__init__()
        self._heartbeat = Heartbeat(self.context.folder, type(self).__name__)

    def forward(self, data: Any) -> Any:
        """``work`` under the heartbeat."""
        with self._heartbeat:
            return self.work(data)

    def deserialize(self, data: bytes) -> Any:
        """Bytes as they are."""
        return bytes(data)

    def serialize(self, data: Any) -> bytes:
        """Bytes as they are."""
        return data

    @abstractmethod
    def work(self, data: Any) -> Any:
        """What the stage does with a request, or with a batch where it has batches."""


class Ingest(Stage):
    """From bytes to a checked request."""

    def work(self, data: bytes) -> Wanted:
        secret, body = data[: len(self.context.secret)], data[len(self.context.secret) :]
        if not hmac.compare_digest(secret, self.context.secret):
            raise ClientError("this port belongs to the gateway of qtarget serve; ask that one")
        identity = self.context.loaded.identity
        try:
            return unpack_request(body, identity.limits, identity.vocab_size)
        except MalformedError as error:
            raise ClientError(str(error)) from error
        except (DataError, HyperparameterError) as error:
            raise ValidationError(str(error)) from error


class Score(Stage):
    """From checked requests to numbers; requests that want the same share forward passes, sorted by length."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self._source: Source = self.context.loaded.source()
        super().__init__()

    def work(self, data: Any) -> Any:
        if isinstance(data, Wanted):  # mosec gives single requests where max_batch is 1
            return self._batch([data])[0]
        return self._batch(data)

    def _batch(self, requests: Sequence[Wanted]) -> list[list[ScoredRow] | str]:
        alike: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(requests):
            listed = None if request.candidate_ids is None else tuple(request.candidate_ids)
            alike.setdefault((request.top_k, listed), []).append(index)
        out: list[list[ScoredRow] | str] = [""] * len(requests)
        for members in alike.values():
            for index, scored in zip(members, self._together([requests[i] for i in members]), strict=True):
                out[index] = scored
        return out

    def _together(self, requests: Sequence[Wanted]) -> list[list[ScoredRow] | str]:
        """Rows of each request; the reason instead, for the requests that fail."""
        try:
            scored = self._source.score(
                [row for request in requests for row in request.rows],
                requests[0].top_k,
                requests[0].candidate_ids,
                positions=[at for request in requests for at in request.positions],
            )
        except Exception as error:
            # one by one, so that the request which is to blame fails alone
            if len(requests) > 1:
                return [alone for request in requests for alone in self._together([request])]
            if isinstance(error, DataError | HyperparameterError):
                return [str(error)]  # about the request itself
            logger.exception("a request could not be scored")
            return [FAILED]
        ends = np.cumsum([len(request.rows) for request in requests])
        parts = [scored[end - len(request.rows) : end] for end, request in zip(ends, requests, strict=True)]
        return [
            part if _finite(part) else "the model's log-probs are NaN or infinite for this request" for part in parts
        ]


class Egress(Stage):
    """From numbers to bytes."""

    def work(self, data: list[ScoredRow] | str) -> bytes:
        if isinstance(data, str):
            raise ServerError(data)
        return pack_answer(self.context.loaded.identity.model_fingerprint, data)


def _finite(rows: Sequence[ScoredRow]) -> bool:
    return all(np.isfinite(row.label_log_probs).all() for row in rows)
