"""The server from outside, with a scorer that needs no model and fails on demand."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from qtarget.core.errors import ConfigError, ScoringServerError, ServingError
from qtarget.scoring.sources.http import Retries
from qtarget.scoring.sources.mosec import MosecSource
from qtarget.scoring.sources.wire import CONTENT_TYPE, pack_request, unpack_answer
from qtarget.serving.server import check_address, read_token
from qtarget.serving.settings import ServeSettings
from qtarget.serving.supervisor import Supervisor
from tests.serving.helpers import ENVIRONMENT, Running, alive, descendants, stub_server, until
from tests.serving.stub import CRASH, HANG, NATIVE_HANG, NOT_FINITE, RAISE, SLOW, VOCAB, expected

TOKEN = "correct-horse-battery"
LIMITS = {"body_bytes": 20_000, "rows": 4, "row_tokens": 32, "top_k": 8}


@pytest.fixture(scope="module")
def server():
    """One worker, so that each crash and each hang takes the whole pipeline down."""
    settings = {"timeout": 1.0, "queue": 4, "max_batch": 2, "limits": LIMITS}
    with stub_server(token=TOKEN, **settings) as running:
        yield running


def authorized(server: Running, body: bytes) -> tuple[int, str, bytes]:
    return server.ask("/score", body, Authorization=f"Bearer {TOKEN}")


def request(*ids: int, top_k: int = 0) -> bytes:
    return pack_request([np.array(ids)], [np.arange(1, len(ids))], top_k, None)


def assert_works(server: Running) -> None:
    """A good request gets its own numbers."""
    source = MosecSource(server.url, token=TOKEN)
    (scored,) = source.score([[1, 2, 3]], 0)
    np.testing.assert_array_equal(scored.label_log_probs, expected(np.array([1, 2, 3]), np.array([1, 2])))
    source.close()


def edited(**fields) -> bytes:
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(request(1, 2, 3)), **fields})


GARBAGE = {
    "nothing": (b"", 400, "empty"),
    "noise": (bytes(range(255, 0, -1)), 400, "no msgpack"),
    "half a message": (request(1, 2, 3)[:-9], 400, "no msgpack"),
    "JSON": (json.dumps({"token_ids": [1, 2]}).encode(), 400, "no msgpack"),
    "a list": (msgspec.msgpack.encode([1, 2]), 400, "no msgpack"),
    "names that are no text": (b"\x81\xa2\xff\xfe\x01", 400, "no msgpack"),
    "a field missing": (msgspec.msgpack.encode({"top_k": 1}), 422, "missing required field"),
    "a field too many": (edited(prompt="hello"), 422, "unknown field"),
    "text for numbers": (edited(token_ids="hello"), 422, "Expected `bytes`"),
    "ragged bytes": (edited(token_ids=b"123"), 422, "whole int32 numbers"),
    "lengths that lie": (edited(lengths=(9).to_bytes(4, "little")), 422, "holds 3 numbers; expected 9"),
    "an id outside": (request(1, VOCAB), 422, "the model knows 0 to 99"),
    "position 0": (edited(positions=bytes(8)), 422, "nothing predicts position 0"),
    "a negative top_k": (edited(top_k=-1), 422, "top_k=-1"),
    "too large a top_k": (request(1, 2, top_k=9), 422, "limit of 8"),
    "too long a row": (request(*range(33)), 422, "row_tokens 33 exceeds this server's limit of 32"),
    "too many rows": (pack_request([np.array([1])] * 5, [np.array([])] * 5, 0, None), 422, "rows 5"),
    "nested a thousand times": (b"\x81\xa1x" * 5000, 422, "wrong fields"),
    "too long a body": (bytes(20_001), 413, "exceeds 20000 bytes"),
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_refused_and_the_next_request_works(server, kind):
    body, status, words = GARBAGE[kind]
    found, content_type, answer = authorized(server, body)
    assert (found, content_type) == (status, "application/json"), answer
    assert words in json.loads(answer)["error"]
    found, content_type, answer = authorized(server, request(1, 2, 3))
    assert (found, content_type) == (200, CONTENT_TYPE)
    _, (row,) = unpack_answer(answer, [2], 0, None)
    np.testing.assert_array_equal(row.label_log_probs, expected(np.array([1, 2, 3]), np.array([1, 2])))


def test_a_request_that_fails_fails_alone(server):
    bodies = [request(1, 2), request(1, RAISE), request(3, 4), request(1, NOT_FINITE)] * 3
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: authorized(server, body), bodies))
    assert [status for status, *_ in answers] == [200, 500, 200, 500] * 3
    assert json.loads(answers[1][2]) == {"error": "internal error: scoring failed; the server's log says why"}
    until(lambda: any("RuntimeError: the stub was asked to fail" in line for line in server.log))
    assert "NaN or infinite" in answers[3][2].decode()


def test_without_the_token_nothing_is_told(server):
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {TOKEN}x"},
    ):
        for path, body in (("/score", request(1, 2)), ("/info", None), ("/metrics", None), ("/openapi", None)):
            assert server.ask(path, body, **headers)[0] == 401, (path, headers)
    assert server.ask("/")[0] == 200
    with pytest.raises(ScoringServerError, match=r"answers 401; .*QTARGET_API_KEY"):
        MosecSource(server.url)
    assert_works(server)


@pytest.mark.parametrize(("trap", "status"), [(CRASH, 503), (HANG, 408), (NATIVE_HANG, 408)])
def test_a_crash_or_a_hang_passes(server, trap, status):
    assert authorized(server, request(1, trap))[0] == status
    assert_works(server)


def test_the_pipeline_killed_outright_comes_back(server):
    before = server.pipeline()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in before))
    assert_works(server)


def test_a_client_that_goes_away_hurts_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 5000\r\n\r\n".encode()
    for part in (b"", b"POST", head, head + bytes(100)):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(part)
    assert_works(server)


def test_sixty_clients_at_a_queue_of_four_lose_nothing(server):
    source = MosecSource(server.url, token=TOKEN, retries=Retries(attempts=20, first=0.1, longest=1.0))
    rows = [np.array([SLOW, i, i + 1]) for i in range(60)]
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda row: source.score([row], 0)[0], rows))
    for row, scored in zip(rows, answers, strict=True):
        np.testing.assert_array_equal(scored.label_log_probs, expected(row, np.array([1, 2])))
    metrics = server.ask("/metrics", None, Authorization=f"Bearer {TOKEN}")[2].decode()
    refused = [line for line in metrics.splitlines() if line.startswith('qtarget_answers_total{code="429"}')]
    assert float(refused[0].split()[1]) > 10
    assert "qtarget_pipeline_process_duration_second_sum" in metrics  # mosec's own follow ours
    source.close()


def test_two_workers_outlive_a_crash_without_a_restart():
    with stub_server(workers=2, timeout=1.0) as server:
        assert server.ask("/score", request(1, CRASH))[0] == 408
        until(lambda: server.metric("qtarget_worker_deaths_total") == 1)
        for _ in range(4):
            assert server.ask("/score", request(1, 2))[0] == 200
        assert server.metric("qtarget_restarts_total") == 0

        # and a clean stop: what is under way is answered, what is new is not
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(server.ask("/score", request(1, *[SLOW] * 10))[0]))
        thread.start()
        until(lambda: server.metric("qtarget_requests_under_way") == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.ask("/")[0] == 503)
        status, _, body = server.ask("/score", request(1, 2))
        assert status == 503 and b"stopping" in body
        thread.join()
        assert answers == [200]
        assert server.process.wait(10) == 0


def test_nothing_is_left_when_the_server_itself_is_killed():
    with stub_server() as server:
        started = server.pipeline()
        assert len(started) >= 5  # mosec's parent and its server, three stages
        server.process.kill()
        server.process.wait()
        until(lambda: not any(alive(pid) for pid in started), 5)


def test_too_many_restarts_end_the_server():
    with stub_server(max_restarts=0) as server:
        assert server.ask("/score", request(1, CRASH))[0] == 503
        assert server.process.wait(20) != 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loader": "tests.serving.stub:fail"}, "ended with code 1 before it was ready.*no such model anywhere"),
        ({"loader": "tests.serving.stub:end"}, "ended with code 0 before it was ready"),
        ({"start_timeout": 0.05}, "was not ready after 0 seconds"),
    ],
)
def test_a_failing_start_is_a_failure(settings, words, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", ENVIRONMENT)
    before = set(descendants(os.getpid()))
    supervisor = Supervisor(
        ServeSettings(**{"loader": "tests.serving.stub:load", "model": "stub", **settings}), tmp_path
    )
    with pytest.raises(ServingError) as raised:
        asyncio.run(supervisor.start())
    assert re.search(words, str(raised.value), re.DOTALL), raised.value
    assert set(descendants(os.getpid())) <= before


def test_a_signal_ends_a_start(tmp_path):
    text = json.dumps({"loader": "tests.serving.stub:never", "model": str(tmp_path / "begun"), "token": None})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.helpers", text], env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    until((tmp_path / "begun").exists, 60)
    started = descendants(process.pid)
    assert started
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")
    assert not any(alive(pid) for pid in started)


def test_another_model_after_a_restart_ends_the_server(tmp_path, monkeypatch):
    """Its clients would mix the numbers of two models."""
    monkeypatch.setattr(os, "environ", ENVIRONMENT)
    before = set(descendants(os.getpid()))
    name = tmp_path / "name"
    name.write_text("one")

    async def run() -> None:
        (tmp_path / "run").mkdir()
        supervisor = Supervisor(
            ServeSettings(model=str(name), loader="tests.serving.stub:load_named"), tmp_path / "run"
        )
        try:
            await supervisor.start()
            name.write_text("another")
            os.kill(supervisor._process.pid, signal.SIGKILL)
            await asyncio.wait_for(supervisor.watch(), 60)
        finally:
            await supervisor.stop()

    with pytest.raises(
        ServingError, match="changed while it was served: its fingerprint was stub one and is stub another"
    ):
        asyncio.run(run())
    assert set(descendants(os.getpid())) <= before


def test_a_port_that_is_taken_is_said_at_once(server):
    from typer.testing import CliRunner

    from qtarget.cli.app import app

    port = server.url.rsplit(":", 1)[1]
    begin = time.monotonic()
    with pytest.raises(ServingError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another --port"):
        CliRunner().invoke(app, ["serve", "anything", "--port", port], catch_exceptions=False)
    assert time.monotonic() - begin < 5


def test_other_machines_need_a_token():
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, None)
    check_address("0.0.0.0", "secret")
    for host in ("0.0.0.0", "192.168.1.5", "example.org", "::"):
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            check_address(host, None)


def test_tokens_are_read_from_a_file_or_the_environment(tmp_path):
    path = tmp_path / "token"
    path.write_text("abc123\n")
    assert read_token(path, "other") == "abc123"
    assert read_token(None, "other") == "other"
    assert read_token(None, None) is None
    for text in ("", " \n", "two words", "schlüssel"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="one printable ASCII word"):
            read_token(path, None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none", None)
