"""The only port that others see: connections, token, origin, size, ``/info``, ``/metrics``, honest codes while nobody is home."""

from __future__ import annotations

import asyncio
import hmac
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict

import aiohttp
from aiohttp import web

from qtarget.core.errors import ServingError
from qtarget.scoring.sources.wire import CONTENT_TYPE
from qtarget.serving.connections import BACKLOG, Gate
from qtarget.serving.origin import foreign
from qtarget.serving.settings import ServeSettings
from qtarget.serving.supervisor import Supervisor

READ_SECONDS = 30.0
"""How long a client may take to send a request's body."""
SEND_SECONDS = 60.0
"""How long a client may take to read its answer."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """HTTP in front of a supervised pipeline.

    Args:
        supervisor: of the pipeline.
        token: that clients must send as ``Authorization: Bearer TOKEN``, except for ``GET /``.
        settings: ``timeout``, ``limits``, ``header_timeout`` and ``hosts`` count here.
        connections: at once.
    """

    def __init__(self, supervisor: Supervisor, *, token: str | None, settings: ServeSettings, connections: int) -> None:
        self._supervisor = supervisor
        self._token = token
        self._hosts = frozenset(settings.hosts)
        self._timeout = settings.timeout
        self._header_timeout = settings.header_timeout
        self._connections = connections
        self._body_bytes = body_bytes = settings.limits.body_bytes
        self._answers: Counter[int] = Counter()
        self._under_way = 0
        self._draining = False
        app = web.Application(client_max_size=body_bytes, middlewares=[self._middleware])
        app.add_routes(
            [
                web.get("/", self._ready),
                web.get("/info", self._info),
                web.get("/metrics", self._metrics),
                web.post("/score", self._score),
            ]
        )
        # ``server.serve`` has the signal handlers
        # a compressed body could be larger than what client_max_size has counted
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, auto_decompress=False)
        self._listener: asyncio.Server | None = None
        self._gate: Gate | None = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self, host: str, port: int) -> int:
        """Listen; the port is returned, which the system chooses for 0.

        Raises:
            ServingError: the address cannot be listened on.
        """
        await self._runner.setup()
        assert self._runner.server is not None
        loop = asyncio.get_running_loop()
        self._gate = Gate(self._runner.server, most=self._connections, header_seconds=self._header_timeout)
        try:
            self._listener = await loop.create_server(self._gate, host, port, reuse_address=True, backlog=BACKLOG)
        except OSError as error:
            await self._runner.cleanup()
            raise ServingError(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port"
            ) from error
        loop.set_exception_handler(self._gate.on_loop_error)
        self._session = aiohttp.ClientSession(connector=self._supervisor.connector())
        return self._listener.sockets[0].getsockname()[1]

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests (503) and wait for those under way; whether all came to an end."""
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                while self._under_way:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Listen no longer."""
        if self._listener is not None:
            self._listener.close()
        if self._session is not None:
            await self._session.close()
        await self._runner.cleanup()

    # -- requests ------------------------------------------------------------------------------------------------

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        assert self._gate is not None
        with self._gate.request(request.protocol):
            try:
                answer = self._refused(request) or await handler(request)
            except web.HTTPException as error:
                text = f"the body exceeds {self._body_bytes} bytes" if error.status == 413 else error.reason
                answer = _error(error.status, text)
            self._answers[answer.status] += 1
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await answer.prepare(request)
                    await answer.write_eof()
            except TimeoutError:  # whoever does not read its answer keeps no memory of ours
                if request.transport is not None:
                    request.transport.abort()
            return answer

    def _refused(self, request: web.Request) -> web.Response | None:
        """What those are answered who may not ask; their connections end with it."""
        answer = None
        if self._token is None and (reason := foreign(request.headers, self._hosts)) is not None:
            answer = _error(403, reason)
        elif request.path != "/" and not self._authorized(request):
            answer = _error(401, "a bearer token is needed and none, or a wrong one, was sent")
            answer.headers["WWW-Authenticate"] = "Bearer"
        if answer is not None:
            answer.force_close()
        return answer

    def _authorized(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        # bytes: ``compare_digest`` refuses text that is not ASCII
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _ready(self, request: web.Request) -> web.Response:
        return web.json_response({"state": "ready"}) if self._is_ready() else self._away()

    async def _info(self, request: web.Request) -> web.Response:
        identity = self._supervisor.identity
        return self._away() if identity is None else web.json_response(asdict(identity))

    async def _score(self, request: web.Request) -> web.Response:
        if "Content-Encoding" in request.headers:
            return _error(415, "the body has a Content-Encoding; expected a msgpack map as it is")
        # before a byte is read; a body that states no length meets ``client_max_size``
        if (request.content_length or 0) > self._body_bytes:
            raise web.HTTPRequestEntityTooLarge(self._body_bytes, request.content_length or 0)
        try:
            async with asyncio.timeout(READ_SECONDS):
                body = await request.read()
        except TimeoutError:
            return _error(408, f"the request was not sent within {READ_SECONDS:.0f} seconds")
        if not body:
            return _error(400, "the body is empty; expected a msgpack map")
        if not self._is_ready():
            return self._away()
        self._under_way += 1
        try:
            return await self._forward(body)
        finally:
            self._under_way -= 1

    async def _forward(self, body: bytes) -> web.Response:
        assert self._session is not None
        # mosec's own time-out answers first
        limit = aiohttp.ClientTimeout(total=self._timeout + 5.0)
        try:
            async with self._session.post(
                f"{self._supervisor.inner}/score", data=self._supervisor.secret + body, timeout=limit
            ) as answer:
                content = await answer.read()
        except TimeoutError:
            return _error(408, f"no answer within {self._timeout:g} seconds")
        except aiohttp.ClientError:
            return self._away()
        if answer.status == 200 and answer.content_type == CONTENT_TYPE:
            return web.Response(body=content, content_type=CONTENT_TYPE)
        if answer.status == 503:
            return self._away()
        if answer.status == 200:
            return _error(502, "the pipeline answered something that is no answer")
        return _error(answer.status, content.decode(errors="replace") or answer.reason or "")

    def _is_ready(self) -> bool:
        return self._supervisor.state == "ready" and not self._draining

    def _away(self) -> web.Response:
        if self._draining or self._supervisor.state in ("stopping", "stopped"):
            return _error(503, "the server is stopping")
        answer = _error(503, "the server is starting")
        answer.headers["Retry-After"] = str(math.ceil(self._supervisor.seconds_to_ready))
        return answer

    async def _metrics(self, request: web.Request) -> web.Response:
        """Ours, then mosec's of each stage while the pipeline is up."""
        theirs = ""
        if self._supervisor.state == "ready" and self._session is not None:
            try:
                limit = aiohttp.ClientTimeout(total=5.0)
                async with self._session.get(f"{self._supervisor.inner}/metrics", timeout=limit) as answer:
                    theirs = await answer.text()
            except (aiohttp.ClientError, TimeoutError):
                theirs = ""
        return web.Response(text=self._own_metrics() + theirs, content_type="text/plain", charset="utf-8")

    def _own_metrics(self) -> str:
        s, gate = self._supervisor, self._gate
        assert gate is not None
        lines = [
            "# HELP qtarget_answers_total Answers by HTTP status.",
            "# TYPE qtarget_answers_total counter",
            *(f'qtarget_answers_total{{code="{code}"}} {count}' for code, count in sorted(self._answers.items())),
        ]
        for name, kind, value, text in (
            ("qtarget_requests_under_way", "gauge", self._under_way, "Requests in the pipeline."),
            ("qtarget_ready", "gauge", int(self._is_ready()), "1 when requests are answered."),
            ("qtarget_connections", "gauge", len(gate), "Open connections."),
            ("qtarget_connections_closed_total", "counter", gate.closed_silent, "Closed without a request."),
            ("qtarget_connections_refused_total", "counter", gate.refused, "Refused: all had a request."),
            ("qtarget_restarts_total", "counter", s.restarts, "Restarts of the whole pipeline."),
            ("qtarget_worker_deaths_total", "counter", s.worker_deaths, "Workers that died."),
            ("qtarget_worker_hangs_total", "counter", s.hangs, "Workers killed because they hung."),
        ):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join(lines) + "\n"


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)
