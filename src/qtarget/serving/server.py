"""``qtarget serve``: gateway and supervisor in one event loop, from start to a clean stop."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.scoring.sources.identity import Identity
from qtarget.serving.connections import connections_within, raise_file_limit
from qtarget.serving.gateway import Gateway
from qtarget.serving.origin import is_loopback
from qtarget.serving.settings import ServeSettings, check_device
from qtarget.serving.supervisor import Supervisor
from qtarget.storage.files import read_small


async def serve(
    settings: ServeSettings,
    *,
    host: str,
    port: int,
    token: str | None,
    on_ready: Callable[[str, Identity], None],
) -> None:
    """Serve until SIGTERM or SIGINT: requests under way are answered first; a second signal ends them.

    Args:
        settings: of the model and the pipeline.
        host, port: where to listen; port 0 lets the system choose.
        token: bearer token that clients must send.
        on_ready: is told the URL and the model once requests are answered.

    Raises:
        ConfigError: another address than this machine's own, without a token; no such model; too few open files.
        ServingError: the address is taken, the model does not load, or the pipeline breaks too often.
    """
    check_address(host, token)
    if settings.loader == ServeSettings.loader:  # what another takes for a model is its own affair
        check_model(settings.model)
        check_row_tokens(settings.limits.row_tokens, settings.model)
        check_device(settings.device)
    if host.lower() not in settings.hosts:
        settings = replace(settings, hosts=(*settings.hosts, host.lower()))
    connections = connections_within(settings.max_connections, raise_file_limit())
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    signals: list[int] = []

    def on_signal(number: int) -> None:
        signals.append(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    with tempfile.TemporaryDirectory(prefix="qtarget-", ignore_cleanup_errors=True) as folder:
        supervisor = Supervisor(settings, Path(folder))
        gateway = Gateway(supervisor, token=token, settings=settings, connections=connections)
        # before the model is loaded: a taken port shows at once, and early clients get 503 with Retry-After
        at = await gateway.open(host, port)
        try:
            stopped = asyncio.create_task(stop.wait())
            if await _first(supervisor.start(), stopped):
                assert supervisor.identity is not None
                on_ready(f"http://{f'[{host}]' if ':' in host else host}:{at}", supervisor.identity)
                watch = asyncio.create_task(supervisor.watch())
                await asyncio.wait([watch, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not watch.done():
                    await _drain(gateway, settings.timeout, signals)
                await _end(watch)
        finally:
            await supervisor.stop()
            await gateway.close()


async def _first(work: Coroutine[Any, Any, None], stopped: asyncio.Task[bool]) -> bool:
    """Whether ``work`` came to its end before a signal; it is cancelled else. Its error is raised."""
    task = asyncio.create_task(work)
    await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
    finished = task.done()
    await _end(task)
    return finished


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel what still runs; raise what it raised before."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _drain(gateway: Gateway, seconds: float, signals: list[int]) -> None:
    """Until all requests are answered, or their time-out is over, or a second signal comes."""
    draining = asyncio.create_task(gateway.drain(seconds))
    while not draining.done() and len(signals) < 2:
        await asyncio.sleep(0.05)
    draining.cancel()


def check_address(host: str, token: str | None) -> None:
    """Refuse to offer a model to a network unasked.

    Raises:
        ConfigError: ``host`` is not a loop-back address and there is no token.
    """
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"--host {host} can be reached from other machines; expected a token then: write one to a file and pass "
            "--token-file FILE, or keep 127.0.0.1"
        )


def check_model(name: str) -> None:
    """Notice a folder that is none, or holds no model, before anything is started; of a hub name nothing is known yet.

    Raises:
        ConfigError: says what is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        wrong = (
            "is no folder"
            if not path.is_dir()
            else "has no config.json"
            if not (path / "config.json").is_file()
            else ""
        )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        wrong = "does not exist"
    else:
        wrong = ""
    if wrong:
        raise ConfigError(f"model {name!r} {wrong}; expected a folder that transformers can load, or a hub name")


def check_row_tokens(wanted: int, model: str) -> None:
    """Refuse longer rows than a model in a folder has positions, by its config alone.

    Raises:
        ConfigError: says both numbers; or the config is broken.
    """
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        longest = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); copy the model again") from error
    if isinstance(longest, int) and wanted > longest:
        raise ConfigError(f"--max-row-tokens {wanted} exceeds the model's {longest} positions; allow at most that")


def read_token(path: Path | None, variable: str | None) -> str | None:
    """The token from a file, else from the value of an environment variable, else none.

    Raises:
        ConfigError: the file cannot be read, or the token is empty or has spaces or non-ASCII characters inside.
    """
    if path is None:
        token = variable
    else:
        try:
            token = read_small(path).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--token-file {path} cannot be read: {error}") from error
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("the token is empty or has spaces or non-ASCII characters; expected one printable ASCII word")
    return token
