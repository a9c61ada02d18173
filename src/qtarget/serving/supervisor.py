"""Keep the pipeline running: its own process group, started again after crashes and hangs, gone when we are gone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiohttp

from qtarget.core.errors import ServingError
from qtarget.scoring.sources.http import KEY_VARIABLE
from qtarget.scoring.sources.identity import Identity
from qtarget.serving.cell import REFUSED, SOCKET, Cell
from qtarget.serving.connections import OUT_OF_FILES
from qtarget.serving.heartbeat import read_heartbeats, stopped_processes
from qtarget.serving.pipeline import FAILURE, SECRET, SETTINGS
from qtarget.serving.settings import IDENTITY, ServeSettings

WATCH_SECONDS = 0.1
HANG_GRACE = 2.0
"""Seconds beyond the time-out until a worker counts as hung: until then mosec's own alarm can still interrupt it."""
STOPPED_GRACE = 2.0
"""Seconds that a process may stand still (SIGSTOP) until it counts as hung."""
FAILED_STARTS = 3
"""Starts that may fail in a row after the first has succeeded."""
RESTART_WINDOW = 600.0
LONGEST_PAUSE = 30.0
LOG_LINES = 40

logger = logging.getLogger(__name__)


class ModelChangedError(ServingError):
    """The files of the model are others than when the server started."""


class Supervisor:
    """Starts and watches one pipeline.

    Args:
        settings: of the server.
        folder: private and empty; holds settings, secret, heartbeats and sockets.

    Attributes:
        state: what the pipeline is doing.
        identity: of the served model, once it was ready.
        restarts: of the whole pipeline.
        worker_deaths: workers that ended, whether or not the pipeline had to be restarted for it.
        hangs: workers that were killed because they hung.
        secret: what the gateway begins each body with.
        port_is_shared: the system allowed no network namespace, so that others of this machine can connect to ``port``.
        port: of the pipeline, on the 127.0.0.1 that ``connector`` leads to.
    """

    def __init__(self, settings: ServeSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._recent: deque[float] = deque()
        self._start_seconds, self._started_at = 0.0, 0.0
        self._cell: Cell | None = None
        self._stopped: dict[int, float] = {}
        self.state: Literal["starting", "ready", "stopping", "stopped"] = "starting"
        self.identity: Identity | None = None
        self.restarts = self.worker_deaths = self.hangs = 0
        self.secret = secrets.token_bytes(32)
        self.port = 0
        self.port_is_shared = False

    @property
    def seconds_to_ready(self) -> float:
        """How long a start still takes, as the last one took; at least one second."""
        return max(1.0, self._start_seconds - (time.monotonic() - self._started_at))

    @property
    def inner(self) -> str:
        """URL of the pipeline's own HTTP server, for sessions with ``connector``."""
        return f"http://127.0.0.1:{self.port}"

    def connector(self) -> aiohttp.TCPConnector:
        """Connects into the pipeline's own network, where it has one, see ``qtarget.serving.cell``."""
        return aiohttp.TCPConnector(limit=0, socket_factory=self._make_socket)

    def _make_socket(self, address: tuple[Any, ...]) -> socket.socket:
        if self._cell is not None:
            return self._cell.fetch()
        made = socket.socket(*address[:3])
        made.setblocking(False)
        return made

    async def start(self) -> None:
        """Start the pipeline and wait until it is ready.

        Raises:
            ServingError: it ends or is not ready in time; with the end of its output.
        """
        self.state, self._started_at = "starting", time.monotonic()
        self._prepare_folder()
        await self._spawn()
        try:
            async with asyncio.timeout(self._settings.start_timeout):
                await self._until_ready()
        except TimeoutError:
            await self.kill()
            raise ServingError(
                f"the pipeline was not ready after {self._settings.start_timeout:.0f} seconds; allow more with "
                f"--start-timeout. The end of its output:\n{self.log_tail()}"
            ) from None
        self._adopt_identity(Identity.parse(json.loads((self._folder / IDENTITY).read_text(encoding="utf-8"))))
        self._start_seconds = time.monotonic() - self._started_at
        self.state = "ready"

    async def watch(self) -> None:
        """Restart the pipeline whenever it breaks; returns never.

        Raises:
            ServingError: too many restarts, or the model on disk is another one than at the start.
        """
        blind = False
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                reason, blind = self._what_is_broken(), False
            except OSError as error:
                if error.errno not in OUT_OF_FILES:
                    raise
                if not blind:
                    logger.error("the pipeline cannot be looked at: %s; going on", error.strerror)
                reason, blind = None, True
            if reason is not None:
                await self._restart(reason)

    async def stop(self) -> None:
        """End the pipeline; the gateway has waited for its last answer, so there is nothing that it could still do."""
        self.state = "stopping"
        await self.kill()
        self.state = "stopped"

    async def kill(self) -> None:
        """End the whole process group at once: a worker inside native code, or one that ignores SIGTERM, too."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._reader is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reader, 1.0)
        self._process = None
        if self._cell is not None:
            self._cell.close()
            self._cell = None

    def log_tail(self) -> str:
        """The last lines that the pipeline wrote."""
        return "\n".join(self._log) or "(nothing)"

    # -- starting ------------------------------------------------------------------------------------------------

    def _prepare_folder(self) -> None:
        # of an earlier start: its workers would count as dead ones of this
        for path in self._folder.glob("*.beat"):
            path.unlink()
        for name in (IDENTITY, SOCKET, REFUSED, FAILURE):
            (self._folder / name).unlink(missing_ok=True)
        self._stopped.clear()
        self._settings.write(self._folder / SETTINGS)
        secret = self._folder / SECRET
        secret.touch(mode=0o600)
        secret.write_bytes(self.secret)

    async def _spawn(self) -> None:
        self.port = free_port()
        milliseconds = max(1, round(self._settings.timeout * 1000))
        arguments = {
            "--address": "127.0.0.1",
            "--port": self.port,
            "--path": self._folder / f"ipc{self.restarts}",
            "--timeout": milliseconds,
            "--capacity": self._settings.queue,
            # the gateway puts the secret before each body
            "--max-request-size": self._settings.limits.body_bytes + len(self.secret),
            "--namespace": "qtarget_pipeline",
            "--log-level": "error",
        }
        # mosec lets the environment fill in what the command line leaves out
        # the token is the gateway's alone
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOSEC_") and k != KEY_VARIABLE}
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "qtarget.serving.pipeline",
                str(self._folder),
                *(str(part) for pair in arguments.items() for part in pair),
                # never written to: its end tells the pipeline that we are gone
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                # a process group of its own, so that ``kill`` reaches every worker and not us
                start_new_session=True,
                env=environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            raise ServingError(f"the pipeline cannot be started: {error.strerror or error}") from error
        self._reader = asyncio.create_task(self._read_log(self._process))

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        # not by line: ``readline`` fails where a progress bar writes more than its buffer without a line's end
        while chunk := await process.stdout.read(2**16):
            for line in chunk.decode(errors="replace").replace("\r", "\n").splitlines():
                if line.strip():
                    self._log.append(line[:500])
                    logger.info("pipeline: %s", line)

    async def _until_ready(self) -> None:
        """Wait for mosec's root path, which answers once every stage is connected."""
        assert self._process is not None
        async with aiohttp.ClientSession(connector=self.connector()) as session:
            while True:
                if self._process.returncode is not None:
                    code = self._process.returncode
                    await self.kill()
                    raise ServingError(f"the pipeline ended with code {code} before it was ready{self._why()}")
                if self._enter_cell():
                    with suppress(aiohttp.ClientError, TimeoutError):
                        timeout = aiohttp.ClientTimeout(total=2.0)
                        async with session.get(f"{self.inner}/", timeout=timeout) as answer:
                            if answer.status == 200:
                                return
                await asyncio.sleep(0.05)

    def _enter_cell(self) -> bool:
        """Whether it is known by now which way leads to the pipeline's port."""
        if self._cell is None and (self._folder / SOCKET).exists():
            with suppress(ConnectionError):  # bound, and not listened on yet
                self._cell = Cell(self._folder)
        elif self._cell is None and (self._folder / REFUSED).exists():
            if not self.port_is_shared:
                reason = (self._folder / REFUSED).read_text(encoding="utf-8")
                logger.warning(
                    "no network namespace for the pipeline (%s): other users of this machine can read mosec's metrics at "
                    "port %d; scoring there still needs the secret",
                    reason,
                    self.port,
                )
            self.port_is_shared = True
        return self._cell is not None or self.port_is_shared

    def _why(self) -> str:
        """What the pipeline wrote of its failure, else the end of its output."""
        path = self._folder / FAILURE
        if path.exists():
            return f": {path.read_text(encoding='utf-8')}"
        return f". The end of its output:\n{self.log_tail()}"

    def _adopt_identity(self, identity: Identity) -> None:
        before = self.identity
        if before is not None and before.model_fingerprint != identity.model_fingerprint:
            raise ModelChangedError(
                f"the model on disk changed while it was served: its fingerprint was {before.model_fingerprint} and is "
                f"{identity.model_fingerprint}; start the server again to serve the new one"
            )
        self.identity = identity

    # -- watching ------------------------------------------------------------------------------------------------

    def _what_is_broken(self) -> str | None:
        """Why the pipeline must be restarted; hung workers are killed on the way, mosec replaces one of several."""
        assert self._process is not None
        if self._process.returncode is not None:
            return f"mosec ended with code {self._process.returncode}"
        standing = self._standing_still()
        living: dict[str, int] = {}
        for worker in read_heartbeats(self._folder, self._process.pid):
            # a stage whose last worker died must show, with none
            living.setdefault(worker.stage, 0)
            if not worker.alive:
                self.worker_deaths += 1
                worker.path.unlink(missing_ok=True)
                logger.warning("worker %s (process %d) died", worker.stage, worker.pid)
            elif worker.busy_seconds > self._settings.timeout + HANG_GRACE or worker.pid in standing:
                self.hangs += 1
                what = "is stopped" if worker.pid in standing else f"hangs for {worker.busy_seconds:.0f} s"
                logger.warning("worker %s %s: killed", worker.stage, what)
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
            else:
                living[worker.stage] += 1
            standing.discard(worker.pid)
        if standing:
            return f"process {min(standing)} of the pipeline is stopped"
        # without waiting for mosec, which would first let the lost requests run into their time-out
        dead = [stage for stage, count in living.items() if not count]
        return f"no {dead[0]} worker is left" if dead else None

    def _standing_still(self) -> set[int]:
        """Processes of the pipeline that have been stopped for longer than ``STOPPED_GRACE``."""
        assert self._process is not None
        now = time.monotonic()
        self._stopped = {pid: self._stopped.get(pid, now) for pid in stopped_processes(self._process.pid)}
        return {pid for pid, since in self._stopped.items() if now - since > STOPPED_GRACE}

    async def _restart(self, reason: str) -> None:
        """Raise or be ready again."""
        self.state, self._started_at = "starting", time.monotonic()
        await self.kill()
        for failed in range(FAILED_STARTS):
            self._count_restart(reason)
            # the first two restarts within the window cost no wait, a loop of them does
            await asyncio.sleep(min(LONGEST_PAUSE, 2.0 ** (len(self._recent) - 3)) if len(self._recent) > 2 else 0.0)
            try:
                await self.start()
                logger.warning("restarted in %.1f s: %s", self._start_seconds, reason)
                return
            except ModelChangedError:
                raise
            except ServingError as error:
                if failed == FAILED_STARTS - 1:
                    raise
                reason = str(error)

    def _count_restart(self, reason: str) -> None:
        now = time.monotonic()
        while self._recent and now - self._recent[0] > RESTART_WINDOW:
            self._recent.popleft()
        if len(self._recent) >= self._settings.max_restarts:
            raise ServingError(
                f"the pipeline was restarted {len(self._recent)} times within {RESTART_WINDOW / 60:.0f} minutes, at last: "
                f"{reason}. The end of its output:\n{self.log_tail()}"
            )
        self._recent.append(now)
        self.restarts += 1


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
