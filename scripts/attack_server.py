"""Attack a server that this script starts, over loopback: silence, garbage, a killed worker, a stopped worker.

``python scripts/attack_server.py`` prints one JSON object; ``--quick`` takes under a minute. Whatever happens, every
well-formed request that carries the token must be answered with its own numbers, and the gateway's memory must stay flat.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qtarget.data.embedded import base_model_path
from qtarget.scoring.sources.http import Retries
from qtarget.scoring.sources.mosec import MosecSource
from qtarget.scoring.sources.wire import pack_request

TOKEN = "attacked-on-purpose"
TOLERANCE = 1e-3
"""Nats: batching moves float32 log-probs by rounding alone."""
PATIENCE = Retries(attempts=40, first=0.1, longest=2.0)


@dataclass(frozen=True)
class Plan:
    """How much of each, and how long at most.

    Attributes:
        silent: connections that send nothing, or half a header.
        clients: threads that ask well-formed requests throughout.
        requests: each client's.
        mutated: damaged messages.
        seconds: of all together; beyond, the attack counts as lost.
    """

    silent: int = 5000
    clients: int = 64
    requests: int = 10
    mutated: int = 2000
    seconds: float = 300.0


QUICK = Plan(silent=1500, clients=16, requests=5, mutated=200, seconds=50.0)


def attack(plan: Plan) -> dict[str, object]:
    """Start a server with two workers, attack it, and say how it did.

    Returns:
        The plan; ``answered`` of ``asked`` well-formed requests; ``wrong`` answers; answers to garbage by status; workers
        killed and stopped; seconds; the gateway's memory in MiB before and at its largest; ``held``: whether all is as it should.
    """
    raise_file_limit(plan.silent + 1000)
    begin = time.monotonic()
    with running_server() as (process, url), ExitStack() as silence:
        rows = [np.arange(3 + i, 23 + 2 * i) % 500 for i in range(plan.clients)]
        with closing(MosecSource(url, token=TOKEN, retries=PATIENCE)) as source:
            expected = [scored.label_log_probs for scored in source.score(rows, 0)]
        memory = [resident(process.pid)]
        clients = Clients(url, rows, expected, plan.requests)
        statuses: Counter[str] = Counter()
        silent = hold_silent(url, plan.silent, silence)
        memory.append(resident(process.pid))
        clients.start()
        garbage = threading.Thread(target=send_garbage, args=(url, plan.mutated, statuses))
        garbage.start()
        killed = strike(process.pid, signal.SIGKILL, 0)
        time.sleep(3.0)
        stopped = strike(process.pid, signal.SIGSTOP, -1)
        while (clients.busy() or garbage.is_alive()) and time.monotonic() - begin < plan.seconds:
            memory.append(resident(process.pid))
            time.sleep(0.2)
        out: dict[str, object] = {
            "plan": asdict(plan),
            "silent": silent,
            "asked": plan.clients * plan.requests,
            "answered": clients.answered,
            "wrong": clients.wrong,
            "failures": clients.failures[:5],
            "garbage": dict(sorted(statuses.items())),
            "killed": killed,
            "stopped": stopped,
            "seconds": round(time.monotonic() - begin, 1),
            "memory_mib": [round(memory[0], 1), round(max(memory), 1)],
        }
    # only a damaged header may go without an answer
    unanswered = (
        max(0, statuses["closed"] - plan.mutated // 10)
        + statuses["none"]
        + sum(count for status, count in statuses.items() if status.startswith("5"))
    )
    whole = clients.answered == plan.clients * plan.requests and not clients.wrong and statuses.total() == plan.mutated
    # idle connections cost some kilobytes each; what grows with what was sent would be far more
    out["held"] = whole and not unanswered and max(memory) - memory[0] < 64 and killed + stopped == 2
    return out


class Clients:
    """Threads that ask well-formed requests and compare what comes back."""

    def __init__(self, url: str, rows: list[np.ndarray], expected: list[np.ndarray], requests: int) -> None:
        self.answered = self.wrong = 0
        self.failures: list[str] = []
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(url, row, numbers, requests), daemon=True)
            for row, numbers in zip(rows, expected, strict=True)
        ]

    def start(self) -> None:
        """All at once."""
        for thread in self._threads:
            thread.start()

    def busy(self) -> bool:
        """Whether some still ask."""
        return any(thread.is_alive() for thread in self._threads)

    def _ask(self, url: str, row: np.ndarray, expected: np.ndarray, requests: int) -> None:
        try:
            with closing(MosecSource(url, token=TOKEN, timeout=60.0, retries=PATIENCE, concurrency=1)) as source:
                for _ in range(requests):
                    (scored,) = source.score([row], 0)
                    good = np.allclose(scored.label_log_probs, expected, atol=TOLERANCE)
                    with self._lock:
                        self.answered += 1
                        self.wrong += not good
                    time.sleep(0.2)
        except Exception as error:
            with self._lock:
                self.failures.append(f"{type(error).__name__}: {error}"[:300])


def hold_silent(url: str, count: int, stack: ExitStack) -> int:
    """Open connections that send nothing, or half a header; as many as came about."""
    opened = 0
    for number in range(count):
        try:
            connection = stack.enter_context(socket.create_connection(address(url), timeout=10.0))
            if number % 2:
                connection.sendall(b"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ")
            opened += 1
        except OSError:
            continue
    return opened


def send_garbage(url: str, count: int, statuses: Counter[str]) -> None:
    """Messages with bytes changed, cut, doubled or drawn, some with a damaged header; their answers are counted by status."""
    draw = random.Random(17)
    good = pack_request([np.arange(1, 20)], [np.arange(1, 19)], 2, None)
    for number in range(count):
        body = mutated(good, draw)
        head = f"POST /score HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n"
        damaged = number % 10 == 0
        if damaged:
            head = mutated(head.encode(), draw).decode("latin-1")
        message = f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
        statuses[status_of(url, message, damaged)] += 1


def mutated(good: bytes, draw: random.Random) -> bytes:
    """One damage of four kinds."""
    content = bytearray(good)
    kind = draw.randrange(4)
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind == 1:
        del content[draw.randrange(len(content)) :]
    elif kind == 2:
        content = bytearray(good + good)
    else:
        content = bytearray(draw.randbytes(draw.randint(1, 400)))
    return bytes(content)


def status_of(url: str, message: bytes, damaged: bool) -> str:
    """``200`` ...; ``closed`` for what is no request, ``none`` for no answer in time; made room for others or starting: again.

    Args:
        damaged: the header may have no end, so say that nothing more comes.
    """
    found = None
    for _ in range(40):
        try:
            with socket.create_connection(address(url), timeout=30.0) as connection:
                connection.sendall(message)
                if damaged:
                    connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(64)
        except TimeoutError:
            return "none"
        except OSError:
            answer = b""
        found = re.match(rb"HTTP/1\.[01] (\d+)", answer)
        if found is None and damaged:
            return "closed"
        if found is not None and found[1] not in (b"503", b"429", b"408"):
            return found[1].decode()
        time.sleep(0.25)
    return "none" if found is None else found[1].decode()


def strike(pid: int, number: int, which: int) -> int:
    """Send a signal to one of the workers that score, known by the heartbeat file that it holds open; how many it reached."""
    workers = sorted(p for p in descendants(pid) if holds_heartbeat(p))
    if workers:
        os.kill(workers[which], number)
    return min(len(workers), 1)


def holds_heartbeat(pid: int) -> bool:
    """Whether a process is a worker that scores."""
    try:
        links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(Path(link).name == f"Score-{pid}.beat" for link in links)


def descendants(pid: int) -> list[int]:
    """Process ids of children and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(c) for child in children for c in (child, *descendants(int(child)))]


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def address(url: str) -> tuple[str, int]:
    """Host and port."""
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def raise_file_limit(wanted: int) -> None:
    """For our ends of the connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))


@contextmanager
def running_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``qtarget serve`` of the embedded base model on a free port of this machine, with a token."""
    with tempfile.TemporaryDirectory() as folder:
        token, log = Path(folder) / "token", Path(folder) / "log"
        token.write_text(TOKEN, encoding="utf-8")
        options = ["--port", "0", "--workers", "2", "--timeout", "5", "--token-file", str(token)]
        command = [sys.executable, "-m", "qtarget.cli.main", "serve", str(base_model_path()), *options]
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            yield process, line.split()[0]
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> int:
    """0 when the server held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    found = attack(QUICK if parser.parse_args().quick else Plan())
    print(json.dumps(found, indent=2))
    return 0 if found["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
