"""A server in a process of its own, and what one asks of the operating system about it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtarget.scoring.sources.identity import Limits
from qtarget.serving.settings import ServeSettings
from tests import ROOT

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Running:
    """A server that is ready.

    Attributes:
        process: of ``qtarget serve``: gateway and supervisor.
        line: what it printed.
        log: lines of its standard error so far.
    """

    process: subprocess.Popen[str]
    line: str
    log: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.line.split()[0]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), error.read()

    def metric(self, name: str) -> float:
        text = self.ask("/metrics")[2].decode()
        return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))

    def pipeline(self) -> list[int]:
        """Process ids of all that ``qtarget serve`` started, and what those started."""
        return descendants(self.process.pid)


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for child in children for c in (child, *descendants(int(child)))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def running(command: list[str], **environment: str) -> Iterator[Running]:
    """Start ``command``, wait for its first line, and make sure that nothing of it is left."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **environment},
    )
    lines: queue.Queue[str] = queue.Queue()
    errors: list[str] = []
    readers = [
        threading.Thread(target=lambda: [lines.put(line) for line in process.stdout or ()]),
        threading.Thread(target=lambda: errors.extend(process.stderr or ())),
    ]
    for reader in readers:
        reader.start()
    server = Running(process, "", errors)
    started: list[int] = []
    try:
        try:
            server.line = lines.get(timeout=60)
        except queue.Empty:
            raise AssertionError("".join(errors)) from None
        started = server.pipeline()
        yield server
    finally:
        if process.poll() is None:
            started += server.pipeline()
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            for reader in readers:
                reader.join()
        assert not [pid for pid in started if alive(pid)], "processes are left"


def stub_server(*, loader: str = "tests.serving.stub:load", token: str | None = None, **settings: Any) -> Any:
    """``running`` for the stub; ``settings`` are those of ``ServeSettings``."""
    text = json.dumps({"loader": loader, "model": "stub", "token": token, **settings})
    return running([sys.executable, "-m", "tests.serving.helpers", text])


def main(text: str) -> None:
    """What ``qtarget serve`` does, with settings that have no option there."""
    from qtarget.serving.server import serve

    logging.basicConfig(level=logging.INFO)
    settings = json.loads(text)
    token = settings.pop("token")
    limits = Limits(**settings.pop("limits", {}))

    def announce(url: str, identity: Any) -> None:
        print(url, flush=True)

    asyncio.run(
        serve(ServeSettings(**settings, limits=limits), host="127.0.0.1", port=0, token=token, on_ready=announce)
    )


if __name__ == "__main__":
    main(sys.argv[1])
