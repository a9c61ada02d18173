"""JSON over HTTP with bounded retries, and what scoring engines behind it have in common."""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import numpy as np

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.rows import IntArray, ScoredRow, check_request, empty_row
from qtarget.scoring.sources.bounded import CHECK, SMALL_ANSWER, Answer, read_bounded, watch

T = TypeVar("T")

RETRIED = frozenset({408, 429, 502, 503, 504})
"""Time-out, queue full, and what a restarting server or the proxy before it answers: worth asking again."""

LOG_PROB_SLACK = MASS_SLACK = 1e-2
"""How far rounding may push a server's log-prob above 0, or listed probabilities above 1: half precision's."""

LOG_SOFTMAX = "start vLLM with --logprobs-mode raw_logprobs (its default); other engines must give a log-softmax too"
"""What to do about numbers that are logits, or log-probs of something else."""

KEY_VARIABLE = "QTARGET_API_KEY"
"""Environment variable with the bearer token of a server that asks for one."""


@dataclass(frozen=True)
class Retries:
    """How often and how long to wait; the n-th wait is about ``first * 2**(n - 1)`` seconds, at most ``longest``.

    Attributes:
        attempts: requests at most, the first included.
        first, longest: seconds; a server's Retry-After counts up to ``longest``.
        sleep: waits so many seconds.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, failures: int, retry_after: str | None) -> None:
        """Sleep before the next attempt: the seconds the server asked for, else (also for a date) doubled each time, spread."""
        if retry_after is not None and retry_after.isdecimal():
            seconds = float(retry_after)
        else:
            # spread, so that requests that failed together do not come back together
            seconds = self.first * 2 ** (failures - 1) * random.uniform(0.75, 1.25)
        self.sleep(min(seconds, self.longest))


FIRST_CONTACT = 3
"""Attempts at a server that refuses connections and has never answered: it is not there, or its URL is wrong."""


class Endpoint:
    """One server, spoken to in JSON from several threads.

    Args:
        url: scheme, host and port, with a path prefix if there is one.
        timeout: seconds until a single answer is whole; a long row waits in the server's queue meanwhile.
        retries: for what can pass: no connection, a cut answer, time-outs, 408, 429, 502, 503, 504.
        key: bearer token; default: the environment's.

    Raises:
        ScoringServerError: ``url`` is none.
    """

    def __init__(
        self, url: str, *, timeout: float = 600.0, retries: Retries = Retries(), key: str | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ScoringServerError(f"{url!r} is no URL of a server; expected something like http://host:8000")
        key = key or os.environ.get(KEY_VARIABLE)
        self.url = url.rstrip("/")
        self._retries, self._answered = retries, False
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else None,
            # a dead host shows long before an answer is late
            timeout=httpx2.Timeout(timeout, connect=10.0),
            # the callers' threads are the limit
            limits=httpx2.Limits(max_connections=None),
        )
        self._timeout = timeout
        self._deadline = watch(self._client)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def post(self, path: str, body: dict[str, Any], *, most: int = SMALL_ANSWER) -> dict[str, Any]:
        """The JSON object that answers a JSON object.

        Args:
            most: bytes of the answer.

        Raises:
            ScoringServerError: the server refuses, or still fails after the last attempt.
        """
        return self.exchange("POST", path, _object, most=most, json=body)

    def get(self, *paths: str) -> dict[str, Any]:
        """The JSON object at the first of some paths that the server knows: names differ between versions.

        Raises:
            ScoringServerError: it knows none, refuses, or still fails after the last attempt.
        """
        for path in paths[:-1]:
            try:
                return self.exchange("GET", path, _object)
            except UnknownPathError:
                continue
        return self.exchange("GET", paths[-1], _object)

    def exchange(
        self, method: str, path: str, parse: Callable[[Answer, str], T], *, most: int = SMALL_ANSWER, **request: Any
    ) -> T:
        """What ``parse`` makes of the answer and its URL; asked again for what can pass, ``Cut`` from ``parse`` included.

        Args:
            most: bytes of the answer, decompressed.
            request: ``json``, or ``content`` and ``headers``.

        Raises:
            ScoringServerError: the server still fails after the last attempt, answers too much, or ``parse`` raises it.
        """
        reason, retry_after, refused, made = "", None, False, 0
        for attempt in range(self._retries.attempts):
            if attempt == FIRST_CONTACT and not self._answered and refused:
                break
            if attempt:
                self._retries.wait(attempt, retry_after)
            try:
                with self._deadline.within(self._timeout), self._client.stream(method, path, **request) as stream:
                    self._answered = True
                    response = read_bounded(stream, most, self.url + path)
                # 500 is not among them: ours says it of a request that cannot be scored, and would say it again
                if response.status_code not in RETRIED:
                    return parse(response, self.url + path)
                reason, retry_after = (
                    f"HTTP {response.status_code} {_message(response)}",
                    response.headers.get("retry-after"),
                )
            except (httpx2.TransportError, httpx2.DecodingError, Cut) as error:
                reason, retry_after = f"{type(error).__name__} {error}".strip(), None
                refused = isinstance(error, httpx2.ConnectError)
            made += 1
        raise ScoringServerError(
            f"{self.url}{path} failed {made} times, at last with: {reason}; see that the server runs and is "
            "reachable, then run the same command again: finished shards are kept"
        )


class Cut(Exception):
    """An answer that is not whole."""


class UnknownPathError(ScoringServerError):
    """The server knows no such path."""


def _object(response: Answer, where: str) -> dict[str, Any]:
    """The JSON object of an answer that is not worth asking for again."""
    refuse_failure(response, where)
    try:
        value = response.json()
    except OverflowError as error:
        raise ScoringServerError(f"{where} answers {error}; expected numbers of tokens; {CHECK}") from error
    except ValueError as error:
        raise Cut(f"no JSON ({error}): {response.text[:80]!r}") from error
    if not isinstance(value, dict):
        raise ScoringServerError(f"{where} answers a JSON {type(value).__name__}; expected an object; check --engine")
    return value


def refuse_failure(response: Answer, where: str) -> None:
    """Raise for an answer that says that asking again is of no use.

    Raises:
        ScoringServerError: any status of 300 and above.
    """
    if response.status_code in (404, 405):
        raise UnknownPathError(
            f"{where} answers {response.status_code} {_message(response)}; check --url, --engine and the served model's name"
        )
    if response.status_code in (401, 403):
        raise ScoringServerError(
            f"{where} answers {response.status_code}; it wants a key: put it into the environment variable {KEY_VARIABLE}"
        )
    if response.status_code >= 300:
        raise ScoringServerError(f"{where} refuses with HTTP {response.status_code}: {_message(response)}")


def _message(response: Answer) -> str:
    """What the server says, in any of the shapes that engines use, at most 300 characters."""
    try:
        value = response.json()
        error = value.get("error", value) if isinstance(value, dict) else value
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, OverflowError):
        text = response.text
    return str(text)[:300]


@dataclass(frozen=True)
class ServedModel:
    """What a server tells of itself; empty where it does not tell.

    Attributes:
        name: of the served model.
        engine, version: of the software.
        dtype: of its forward pass.
    """

    name: str
    engine: str
    version: str
    dtype: str


class HttpSource(ABC):
    """An engine behind HTTP: one request a row, several under way, entropy unknown, the tail from what is listed.

    Args:
        endpoint: the server.
        vocab_size: rows of the served model's head; servers do not tell.
        concurrency: rows under way; the engine batches what it has at hand.
        on_tokens: called with the number of wanted tokens of each row that is done.
    """

    engine: str

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        vocab_size: int,
        concurrency: int = 32,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._vocab_size = vocab_size
        self._concurrency = concurrency
        self._on_tokens = on_tokens

    @property
    def vocab_size(self) -> int:
        """Rows of the head, as given."""
        return self._vocab_size

    @abstractmethod
    def describe(self) -> ServedModel:
        """Who answers there.

        Raises:
            ScoringServerError: nobody, or another kind of server.
        """

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """The ids that the server's own tokenizer gives a text, special tokens included.

        Raises:
            ScoringServerError: no usable answer.
        """

    @abstractmethod
    def _score_row(self, ids: np.ndarray, at: np.ndarray, top_k: int, candidate_ids: Sequence[int] | None) -> ScoredRow:
        """The numbers of one row, which has at least one position."""

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``.

        Raises:
            ScoringServerError: the server fails, or its answer is not about these tokens.
            DataError, HyperparameterError: see ``check_request``.
        """
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, self.vocab_size)

        def one(ids: np.ndarray, at: np.ndarray) -> ScoredRow:
            if not len(at):
                return empty_row(top_k, candidate_ids, entropy=False)
            return self._score_row(ids, at, top_k, candidate_ids)

        out: list[ScoredRow] = []
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="scoring")
        try:
            for scored in pool.map(one, rows, places):
                out.append(scored)
                if self._on_tokens:
                    self._on_tokens(len(scored.label_log_probs))
        # after an error the rows that still wait are not sent
        finally:
            pool.shutdown(cancel_futures=True)
        return out


def largest(pairs: Iterable[tuple[float, int]], count: int) -> list[tuple[float, int]]:
    """The most probable of some (log-prob, id), descending; of equal ones the lower id first."""
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:count]


def listed_row(
    label_log_probs: Sequence[float],
    listed: Sequence[Sequence[tuple[float, int]]],
    top_k: int,
    candidate_log_probs: Sequence[Sequence[float]] | None,
    vocab_size: int,
    url: str,
) -> ScoredRow:
    """A ``ScoredRow`` from lists of (log-prob, id), the tail being one minus what is listed.

    The sum is taken in float64; what it leaves is exact to the rounding of the server's float32 log-probs, some 1e-6 of
    probability. Where the whole vocabulary is listed nothing is left, not even rounding.

    Args:
        listed: of each position, ``largest`` of what the server lists there.
        url: of the server, for messages.

    Raises:
        ScoringServerError: an id is outside the vocabulary, or the numbers are no log-probs of one distribution.
    """
    label = np.array(label_log_probs, np.float32)
    candidates = None if candidate_log_probs is None else np.array(candidate_log_probs, np.float32)
    for values in (label, candidates):
        if values is not None:
            require_log_probs(values, url)
    if not top_k:
        return ScoredRow(label, candidate_log_probs=candidates)
    log_probs = np.array([[value for value, _ in pairs] for pairs in listed], np.float64)
    ids = np.array([[token for _, token in pairs] for pairs in listed], np.int32)
    require_log_probs(log_probs, url)
    mass = np.exp(log_probs).sum(-1)
    if mass.max(initial=0.0) > 1 + MASS_SLACK:
        raise ScoringServerError(
            f"{url} lists probabilities that sum to {mass.max():.4g}; expected at most 1; {LOG_SOFTMAX}"
        )
    with np.errstate(divide="ignore"):
        left = 1 - mass if top_k < vocab_size else np.zeros(len(log_probs))
        tail = np.log(np.maximum(left, 0.0))
    if len(ids) and ids.max() >= vocab_size:
        raise ScoringServerError(
            f"{url} lists token {ids.max()}, beyond a vocabulary of {vocab_size} rows; name the model that is served, or "
            "pass its --vocab-size"
        )
    return ScoredRow(label, None, ids, log_probs.astype(np.float32), tail.astype(np.float32), candidates)


def require_log_probs(values: np.ndarray, url: str) -> None:
    """Make sure that a server's numbers may be log-probs; minus infinity is one.

    Raises:
        ScoringServerError: NaN, or a number above zero by more than rounding.
    """
    wrong = values[~(values <= LOG_PROB_SLACK)]
    if wrong.size:
        raise ScoringServerError(
            f"{url} gives {wrong[0]:.4g} as a log-prob; expected at most 0, and no NaN; {LOG_SOFTMAX}"
        )
