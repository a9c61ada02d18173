"""What a server may send: so many bytes after decompression, so long, so deep, with integers that are token ids."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpcore2
import httpx2

from qtarget.core.errors import ScoringServerError

SMALL_ANSWER = 2**24
"""Bytes of an answer that holds no numbers of tokens."""
NUMBER_BYTES = 512
"""Of one log-prob in JSON at most: the text of its token is there too."""
LONGEST_INTEGER = 20
"""Digits; token ids have ten at most."""
HIGHEST_ID = 2**31 - 1
CHECK = (
    "see that the URL is that of a scoring server that can be trusted, and that no proxy before it answers in its place"
)


@dataclass(frozen=True)
class Answer:
    """A whole answer within its bounds."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """For messages."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """Its JSON value.

        Raises:
            ValueError: it is none.
            OverflowError: it is nested too deep, or an integer has more digits than any id.
        """
        try:
            return json.loads(self.content, parse_int=_integer)
        except RecursionError:
            raise OverflowError("JSON that is nested too deep") from None


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise OverflowError(f"an integer of {len(text)} digits")
    return int(text)


def read_bounded(response: httpx2.Response, most: int, where: str) -> Answer:
    """Read an answer as it comes, decompressed, and no further than ``most`` bytes.

    Raises:
        ScoringServerError: it is longer.
        httpx2.TransportError, httpx2.DecodingError: it is cut, late or broken.
    """
    parts: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        size += len(part)
        if size > most:
            raise ScoringServerError(f"{where} answers more than {most} bytes, which this request cannot need; {CHECK}")
        parts.append(part)
    return Answer(response.status_code, response.headers, b"".join(parts))


# -- time --------------------------------------------------------------------------------------------------------


class Deadline(threading.local):
    """Until when the request of this thread must be answered; httpx counts each read anew, so that drops could last for ever."""

    ends = math.inf

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """A request that may take so long."""
        self.ends = time.monotonic() + seconds
        try:
            yield
        finally:
            self.ends = math.inf

    def left(self, timeout: float | None) -> float:
        """Seconds for the next read or write.

        Raises:
            httpcore2.ReadTimeout: none.
        """
        left = min(self.ends - time.monotonic(), math.inf if timeout is None else timeout)
        if left <= 0:
            raise httpcore2.ReadTimeout("the answer was not whole in time")
        return min(left, threading.TIMEOUT_MAX)


class TimedStream(httpcore2.NetworkStream):
    """A connection whose reads and writes end with the deadline."""

    def __init__(self, inner: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """See httpcore2."""
        return self._inner.read(max_bytes, self._deadline.left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """See httpcore2."""
        self._inner.write(buffer, self._deadline.left(timeout))

    def close(self) -> None:
        """See httpcore2."""
        self._inner.close()

    def start_tls(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """See httpcore2."""
        return TimedStream(self._inner.start_tls(*args, **kwargs), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """See httpcore2."""
        return self._inner.get_extra_info(info)


class TimedBackend(httpcore2.NetworkBackend):
    """Makes such connections."""

    def __init__(self, inner: httpcore2.NetworkBackend, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """See httpcore2."""
        return TimedStream(self._inner.connect_tcp(*args, **kwargs), self._deadline)

    def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """See httpcore2."""
        return TimedStream(self._inner.connect_unix_socket(*args, **kwargs), self._deadline)

    def sleep(self, seconds: float) -> None:
        """See httpcore2."""
        self._inner.sleep(seconds)


def watch(client: httpx2.Client) -> Deadline:
    """The deadline that a client's connections keep from now on.

    httpx2 2.16 has no option for the network backend, and no time-out for a whole answer.
    """
    deadline = Deadline()
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            pool = transport._pool
            pool._network_backend = TimedBackend(pool._network_backend, deadline)
    return deadline


# -- values ------------------------------------------------------------------------------------------------------


def token_id(value: Any) -> int:
    """A token id as engines write it: an integer, or its digits.

    Raises:
        ValueError: anything else.

    Example:
        >>> token_id(7), token_id("42")
        (7, 42)
    """
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= LONGEST_INTEGER:
        value = int(value)
    if type(value) is not int or not 0 <= value <= HIGHEST_ID:
        raise ValueError(f"{str(value)[:40]!r} is no token id")
    return value


def number(value: Any) -> float:
    """A JSON number.

    Raises:
        ValueError: anything else, ``true`` and texts among it.
    """
    if type(value) not in (int, float):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return float(value)


def distinct(ids: Iterable[int], position: int, url: str) -> None:
    """Refuse a list that names a token twice: its probability would count twice.

    Raises:
        ScoringServerError: one is there again.
    """
    seen: set[int] = set()
    for token in ids:
        if token in seen:
            raise ScoringServerError(
                f"{url} lists token {token} twice at position {position}; expected each once; update the engine"
            )
        seen.add(token)
