"""Whoever only holds connections open, asks from a foreign page, or stops a process, stops nobody else."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import resource
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtarget.cli.app import app
from qtarget.core.errors import ConfigError, QTargetError
from qtarget.scoring.sources.identity import Limits
from qtarget.scoring.sources.mosec import MosecSource
from qtarget.scoring.sources.wire import CONTENT_TYPE
from qtarget.serving.settings import RANGES, ServeSettings
from tests.serving.helpers import Running, alive, stub_server, until
from tests.serving.stub import SLOW
from tests.serving.test_server import assert_works, request


def address(server: Running) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def ask_as(
    server: Running, headers: dict[str, str], path: str = "/info", body: bytes | None = None
) -> tuple[int, dict]:
    """Headers exactly as given, ``Host`` included."""
    connection = http.client.HTTPConnection(*address(server), timeout=30)
    connection.putrequest("GET" if body is None else "POST", path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.fixture(scope="module")
def server():
    """Without a token; a header may take a second, and 40 connections be open."""
    with stub_server(timeout=5.0, header_timeout=1.0, max_connections=40, hosts=["scorer.example"]) as running:
        yield running


# -- silence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent", [b"", b"GET /info HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"]
)
def test_a_connection_without_the_next_header_is_closed(server, sent):
    """Nothing, half a header, and a whole request with nothing after it."""
    before = server.metric("qtarget_connections_closed_total")
    with socket.create_connection(address(server), timeout=30) as connection:
        connection.sendall(sent)
        begin = time.monotonic()
        while connection.recv(4096):
            pass
        assert 0.5 < time.monotonic() - begin < 20
    assert server.metric("qtarget_connections_closed_total") > before


def test_a_header_that_drips_is_closed_too(server):
    def drip(connection: socket.socket) -> None:
        for _ in range(300):
            connection.sendall(b"X")
            time.sleep(0.1)

    with socket.create_connection(address(server), timeout=30) as connection, pytest.raises(OSError):
        drip(connection)


def test_silent_connections_make_room_for_those_that_ask(server):
    """Three times as many as may be open, again and again."""
    with ExitStack() as stack:
        for _ in range(120):
            stack.enter_context(socket.create_connection(address(server), timeout=30))
        assert server.metric("qtarget_connections") <= 40
        for _ in range(5):
            assert_works(server)


def test_when_every_connection_has_a_request_the_next_one_is_told_so():
    with stub_server(max_connections=2, timeout=20.0) as server:
        sources = [MosecSource(server.url) for _ in range(2)]  # they ask again when they had to make room
        answers: list[int] = []

        def score(source: MosecSource) -> None:
            answers.append(len(source.score([[1, *[SLOW] * 60]], 0)[0].label_log_probs))

        threads = [threading.Thread(target=score, args=(source,)) for source in sources]
        for thread in threads:
            thread.start()

        def refused() -> bool:
            connection = http.client.HTTPConnection(*address(server), timeout=30)
            try:
                connection.request("GET", "/")
                answer = connection.getresponse()
                said = answer.read()
            except ConnectionError:
                return False
            finally:
                connection.close()
            assert answer.status != 503 or (b"ask again" in said and answer.headers["Retry-After"] == "1")
            return answer.status == 503

        until(refused)
        for thread in threads:
            thread.join()
        assert answers == [60, 60]
        for source in sources:
            source.close()
        assert_works(server)


def test_without_a_file_left_it_says_so_and_goes_on():
    with stub_server(header_timeout=30.0) as server:
        pid = server.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        assert soft == hard  # raised at the start
        try:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + 3, hard))
            with ExitStack() as stack:
                for _ in range(30):
                    stack.enter_context(socket.create_connection(address(server), timeout=30))
                until(lambda: any("Too many open files" in line for line in server.log))
                assert server.process.poll() is None
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert_works(server)
        assert server.metric("qtarget_restarts_total") == 0


# -- foreign pages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8100", "localhost:1", "LOCALHOST", "[::1]:80", "scorer.example"]
)
def test_names_of_this_machine_and_allowed_ones_may_ask(server, host):
    assert ask_as(server, {"Host": host})[0] == 200
    assert ask_as(server, {"Host": host, "Origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:8100"},
        {"Host": "evil.example#@127.0.0.1"},
        {"Host": "user@127.0.0.1"},
        {"Host": "0.0.0.0"},
        {"Host": ""},
        {"Host": "127.0.0.1", "Origin": "https://evil.example"},
        {"Host": "127.0.0.1", "Origin": "null"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1@evil.example"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/info", "/metrics", "/score"])
def test_other_names_are_refused_without_a_token(server, headers, path):
    status, said = ask_as(server, headers, path, request(1, 2) if path == "/score" else None)
    assert status == 403 or (status == 400 and not headers["Host"]), said
    if status == 403:
        assert "--allow-host" in said["error"]


def test_with_a_token_any_name_may_ask():
    """A page of another site has no token."""
    with stub_server(token="secret") as server:
        assert ask_as(server, {"Host": "scorer.lan", "Authorization": "Bearer secret"})[0] == 200
        assert ask_as(server, {"Host": "scorer.lan", "Origin": "https://evil.example"})[0] == 401


def test_compressed_bodies_are_refused_unread(server):
    body = gzip.compress(bytes(10**7))
    status, said = ask_as(server, {"Host": "localhost", "Content-Encoding": "gzip"}, "/score", body)
    assert (status, "Content-Encoding" in said["error"]) == (415, True)


# -- the pipeline ------------------------------------------------------------------------------------------------


def beats(server: Running) -> dict[str, int]:
    """Stage -> process id, by the heartbeat file that each worker holds open."""
    found = {}
    for pid in server.pipeline():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = Path(os.readlink(fd)).name
            except FileNotFoundError:
                continue
            if match := re.fullmatch(r"(\w+)-(\d+)\.beat", name):
                found[match[1]] = int(match[2])
    return found


def test_a_stopped_idle_worker_is_replaced(server):
    pid = beats(server)["Score"]
    hangs = server.metric("qtarget_worker_hangs_total")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not alive(pid), 30)
    assert_works(server)
    assert server.metric("qtarget_worker_hangs_total") == hangs + 1
    assert any("worker Score is stopped: killed" in line for line in server.log)


def test_a_stopped_mosec_is_started_anew(server):
    (pid,) = [p for p in server.pipeline() if Path(f"/proc/{p}/comm").read_text().strip() == "mosec"]
    restarts = server.metric("qtarget_restarts_total")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not alive(pid), 30)
    assert_works(server)
    assert server.metric("qtarget_restarts_total") == restarts + 1


def listening(pids: list[int]) -> set[int]:
    """Ports that processes listen on, each from the table of its own network."""
    ports = set()
    for pid in pids:
        links = set()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.add(os.readlink(fd))
            except FileNotFoundError:
                continue
        lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        ports |= {int(f[1].split(":")[1], 16) for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in links}
    return ports


def test_the_pipelines_own_port_is_out_of_reach(server):
    """It listens, in a network of its own; the gateway alone is given sockets of it."""
    if any("no network namespace" in line for line in server.log):
        pytest.skip("this system lets users make no network namespaces")
    ports = listening(server.pipeline())
    assert len(ports) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports.pop()), timeout=10)
    assert_works(server)


def test_without_namespaces_the_port_scores_for_the_gateway_alone():
    with stub_server(loader="tests.serving.stub:load_without_cell") as server:
        assert any("no network namespace for the pipeline (the stub says so)" in line for line in server.log)
        (inner,) = listening(server.pipeline())
        status, _, body = Running(server.process, f"http://127.0.0.1:{inner}").ask("/score", request(1, 2))
        assert status == 400
        assert b"belongs to the gateway" in body
        assert_works(server)


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_out_of_range_are_named(name):
    lowest, highest = RANGES[name]
    for value in (lowest - 1, highest + 1, float("nan")):
        with pytest.raises(ConfigError, match=rf"^{name} is .*; expected {lowest} to {highest}$"):
            ServeSettings(model="m", **{name: value})
    for value in (lowest, highest):
        ServeSettings(model="m", **{name: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["./nowhere"], "model './nowhere' does not exist"),
        (["."], "has no config.json"),
        (["x", "--device", "cpu; rm"], "device 'cpu; rm' is no device"),
        (["x", "--workers", "-1"], "workers is -1; expected 1 to 1024"),
        (["x", "--max-rows", "-5"], "limit rows is -5"),
        (["x", "--max-answer-bytes", str(2**40)], "limit answer_bytes is 1099511627776"),
        (["x", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["x", "--host", "no.such.host.invalid", "--token-file", "token"], "cannot listen on no.such.host.invalid"),
    ],
)
def test_options_are_checked_before_anything_is_started(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("secret")
    begin = time.monotonic()
    with pytest.raises(QTargetError, match=re.escape(words)):
        CliRunner().invoke(app, ["serve", *options, "--port", "0"], catch_exceptions=False)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("value", [-1, 2**31, 1.5, float("nan"), "9", True, None])
def test_limits_are_whole_numbers(value):
    with pytest.raises(ConfigError, match="limit rows is"):
        Limits(rows=value)


def test_the_source_outlives_a_kept_connection_that_was_closed(server):
    """Between two requests of one client the server may close its connection; it asks again."""
    source = MosecSource(server.url)
    time.sleep(1.5)  # beyond header_timeout
    assert len(source.score([[1, 2, 3]], 0)) == 1
    source.close()
    assert server.ask("/score", request(1, 2))[1] == CONTENT_TYPE
