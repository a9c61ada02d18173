"""Connections that say nothing cost nothing: a deadline for a request's header, a cap, and files enough for both."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from qtarget.core.errors import ConfigError

RESERVED_FILES = 256
"""Open files that are no connections of clients: logs, heartbeats, a new pipeline's pipes, a burst of accepted sockets."""
FILES_PER_CONNECTION = 2
"""The client's, and one to the pipeline while its request is there."""
BACKLOG = 128
RELIEF = 64
"""Connections that are closed at once when the system has no file left."""
OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

FULL = b'{"error": "as many connections are open as this server allows, each with a request; ask again"}'
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(FULL), FULL)
)

logger = logging.getLogger(__name__)


class Gate:
    """Makes the protocol of every accepted connection, and knows which of them have a request.

    A connection without a complete request header is closed after ``header_seconds``, whether it is new or kept alive.
    When all ``most`` are taken, the one that has been silent longest makes room; when all have a request, the new one is
    answered 503.

    Args:
        server: makes aiohttp's protocol.
        most: connections at once.
        header_seconds: from the connection, or the last answer, to the end of the next header.

    Attributes:
        closed_silent: connections that were closed because they sent no header in time, or to make room.
        refused: connections that were answered 503.
    """

    def __init__(self, server: web.Server, *, most: int, header_seconds: float) -> None:
        self.server, self.header_seconds = server, header_seconds
        self.closed_silent = self.refused = 0
        self._most = most
        self._open: dict[Any, Connection] = {}
        self._silent: dict[Connection, None] = {}  # oldest first, those that never asked anything before those that did
        self._idle: dict[Connection, None] = {}

    def __call__(self) -> Connection:
        """For ``loop.create_server``."""
        return Connection(self)

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection) -> bool:
        """Whether there is room, which is made if it can be."""
        if len(self._open) >= self._most and not self.make_room():
            self.refused += 1
            return False
        self._open[connection.handler] = connection
        self._silent[connection] = None
        return True

    def make_room(self) -> bool:
        """Close the connection that has been silent longest, if one is."""
        for waiting in (self._silent, self._idle):
            for connection in waiting:
                self.drop(connection)
                return True
        return False

    def drop(self, connection: Connection) -> None:
        """Close a silent connection."""
        self.closed_silent += 1
        self.forget(connection)
        connection.abort()

    def forget(self, connection: Connection) -> None:
        """It is closed, or about to be."""
        self._open.pop(connection.handler, None)
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)

    @contextmanager
    def request(self, handler: Any) -> Iterator[None]:
        """While a request of this connection is answered, nothing closes it from here."""
        connection = self._open.get(handler)
        if connection is None:
            yield
            return
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)
        connection.cancel_deadline()
        try:
            yield
        finally:
            if handler in self._open:
                self._idle[connection] = None
                connection.set_deadline()

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """For ``loop.set_exception_handler``: asyncio accepts again a second after the system had no file left."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
            closed = sum(self.make_room() for _ in range(RELIEF))
            logger.error("%s; %d silent connections closed, going on", error.strerror, closed)
        else:
            loop.default_exception_handler(context)


class Connection(asyncio.Protocol):
    """aiohttp's protocol, with the gate around it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._admitted = False
        self.handler: Any = gate.server()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hand on, or refuse."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._admitted = self._gate.admit(self)
        if self._admitted:
            self.set_deadline()
            self.handler.connection_made(transport)
        else:
            transport.write(REFUSAL)
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Hand on and forget."""
        self.cancel_deadline()
        if self._admitted:
            self._gate.forget(self)
            self.handler.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Hand on."""
        if self._admitted:
            self.handler.data_received(data)

    def eof_received(self) -> bool | None:
        """Hand on."""
        return self.handler.eof_received() if self._admitted else None

    def pause_writing(self) -> None:
        """Hand on."""
        if self._admitted:
            self.handler.pause_writing()

    def resume_writing(self) -> None:
        """Hand on."""
        if self._admitted:
            self.handler.resume_writing()

    def set_deadline(self) -> None:
        """For the end of the next header."""
        self.cancel_deadline()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._gate.header_seconds, self._gate.drop, self)

    def cancel_deadline(self) -> None:
        """A header has come."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()


def raise_file_limit() -> int:
    """Set the soft limit of open files to the hard one; the limit is returned."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):  # some systems name a hard limit that they do not grant
            return soft
    return hard if hard != resource.RLIM_INFINITY else 2**31


def connections_within(most: int, files: int) -> int:
    """As many connections as asked for, or as the limit of open files allows, which the log says.

    Raises:
        ConfigError: it allows none.

    Example:
        >>> connections_within(1024, 20_000)
        1024
        >>> connections_within(1024, 1024)
        384
    """
    room = (files - RESERVED_FILES) // FILES_PER_CONNECTION
    if room < 1:
        raise ConfigError(
            f"this process may open {files} files; expected more than {RESERVED_FILES + FILES_PER_CONNECTION}: raise the hard "
            "limit (`ulimit -Hn`)"
        )
    if room < most:
        logger.warning(
            "%d connections at once, not %d: this process may open %d files; raise `ulimit -Hn` for more",
            room,
            most,
            files,
        )
    return min(most, room)
