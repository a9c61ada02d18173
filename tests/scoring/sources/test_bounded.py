"""A server that sends too much, too slowly, too deep, or nonsense: named with its URL, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc

import numpy as np
import pytest

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.sources import bounded, http, sglang, vllm
from qtarget.scoring.sources.canary import CANARY
from qtarget.scoring.sources.mosec import check_numbers
from tests.scoring.helpers import tiny_model
from tests.scoring.sources.servers import changed, send, serving
from tests.scoring.sources.test_http import KINDS, ROW, Waits, connect, edit_sglang, edit_vllm


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def engine(kind):
    return KINDS[kind][0](tiny_model())


def raw(content: bytes, **headers: str):
    """An answer of 200 with this body."""

    def fault(handler, answer):
        try:
            send(handler, 200, content, {name.replace("_", "-"): value for name, value in headers.items()})
        except ConnectionError:  # whoever asked has read enough
            handler.close_connection = True
        return True

    return fault


def refused(kind, engine, fault, words, *, attempts=4, **options):
    """The error of one scoring request that meets a fault; it names the URL and is not tried again."""
    engine.faults = [fault] * attempts
    waits = Waits()
    with serving(engine) as url:
        source = connect(kind, url, waits, attempts=attempts, **options)
        with pytest.raises(ScoringServerError, match=words) as raised:
            source.score([ROW], 3)
    assert url in str(raised.value)
    return waits


def test_a_bomb_is_not_unpacked(kind, engine):
    """1 GiB of spaces in 1 MiB: read up to the bound, and no further."""
    bomb = gzip.compress(b" " * 2**26, 9) * 16  # members one after the other
    tracemalloc.start()
    waits = refused(kind, engine, raw(bomb, content_encoding="gzip"), "answers more than [0-9]+ bytes")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert waits == []
    assert most < 8 * bounded.SMALL_ANSWER


def test_an_endless_answer_ends(kind, engine, monkeypatch):
    for module in (http, vllm, sglang):
        monkeypatch.setattr(module, "SMALL_ANSWER", 2**16)

    def endless(handler, answer):
        handler.send_response(200)
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
        except ConnectionError:
            handler.close_connection = True
        return True

    assert refused(kind, engine, endless, "answers more than [0-9]+ bytes") == []


@pytest.mark.parametrize("part", ["header", "body"])
def test_an_answer_that_drips_ends_with_the_time_out(kind, engine, part):
    """A byte each 0.1 s is never late by itself; the whole answer is."""

    def drip(handler, answer):
        start = b"HTTP/1.1 200 OK\r\nX-Drip: "
        if part == "body":
            start = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        try:
            handler.wfile.write(start)
            for _ in range(600):
                handler.wfile.write(b"x")
                time.sleep(0.1)
        except ConnectionError:
            pass
        handler.close_connection = True
        return True

    begin = time.monotonic()
    waits = refused(kind, engine, drip, "failed 2 times, at last with: ReadTimeout", attempts=2, timeout=1.0)
    assert len(waits) == 1
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "JSON that is nested too deep"),
        (b'{"a":' * 100_000, "JSON that is nested too deep"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "an integer of 5000 digits"),
    ],
)
def test_json_that_is_too_much_is_named(kind, engine, content, words):
    assert refused(kind, engine, raw(content), words) == []


@pytest.mark.parametrize("token", ["-1", "1.5", "1_0", " 7", "٣", "9" * 15, "true", ""])
def test_ids_of_vllm_are_digits(token):
    engine = KINDS["vllm"][0](tiny_model())
    fault = edit_vllm(lambda e: e[2].update({token: {"logprob": -1.0}}))
    refused("vllm", engine, fault, "at position 2; expected token ids|beyond a vocabulary")


@pytest.mark.parametrize("token", [-1, 1.5, True, "x", None, 2**40, [1]])
def test_ids_of_sglang_are_integers(token):
    engine = KINDS["sglang"][0](tiny_model())
    fault = edit_sglang("input_top_logprobs", lambda e: e[2][0].__setitem__(1, token))
    refused("sglang", engine, fault, "at position 2; expected")


@pytest.mark.parametrize("value", ["-1.0", True, None, [], {}, float("nan"), 1e400])
def test_log_probs_are_numbers(kind, engine, value):
    if kind == "vllm":
        fault = edit_vllm(lambda e: e[2].update({str(ROW[2]): {"logprob": value}}))
    else:
        fault = edit_sglang("input_token_logprobs", lambda e: e[2].__setitem__(0, value))
    refused(kind, engine, fault, "at position 2|as a log-prob")


def test_a_token_listed_twice_is_refused():
    engine = KINDS["sglang"][0](tiny_model())
    fault = edit_sglang("input_top_logprobs", lambda e: e[3].append(list(e[3][0])))
    refused("sglang", engine, fault, "twice at position 3")


@pytest.mark.parametrize("tokens", [7, "123", ["x"], [None], [-1], {"a": 1}, [1.5]])
def test_ids_of_the_tokenizer_route_are_checked(kind, engine, tokens):
    path = "/tokenize" if kind == "vllm" else "/generate"
    asked = engine.post
    answer = {"tokens": tokens, "meta_info": {"input_token_logprobs": tokens}}
    engine.post = lambda found, body: (200, answer) if found == path else asked(found, body)
    with serving(engine) as url:
        source = connect(kind, url)
        with pytest.raises(ScoringServerError, match=url):
            source.tokenize(CANARY)


def good(**changed) -> ScoredRow:
    return ScoredRow(
        **{
            "label_log_probs": np.array([-1.0, -2.0], np.float32),
            "entropy": np.array([0.5, 1.0], np.float16),
            "topk_ids": np.array([[1, 2], [3, 0]], np.int32),
            "topk_log_probs": np.log(np.array([[0.5, 0.2], [0.4, 0.4]], np.float32)),
            "tail_log_mass": np.log(np.array([0.3, 0.2], np.float32)),
            **changed,
        }
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label_log_probs": np.array([-1.0, 0.5], np.float32)}, "gives 0.5 as a log-prob"),
        ({"tail_log_mass": np.array([np.nan, -1.0], np.float32)}, "gives nan"),
        ({"entropy": np.array([0.5, np.nan], np.float32)}, "an entropy outside"),
        ({"entropy": np.array([0.5, 99.0], np.float32)}, "an entropy outside"),
        ({"topk_ids": np.array([[1, 2], [3, 100]], np.int32)}, "an id outside 0 to 99"),
        ({"topk_ids": np.array([[1, 2], [3, -1]], np.int32)}, "an id outside 0 to 99"),
        ({"topk_ids": np.array([[1, 2], [3, 3]], np.int32)}, "or one twice"),
        ({"tail_log_mass": np.zeros(2, np.float32)}, "sum to 1.8"),
        ({"candidate_log_probs": np.array([[1.0], [0.0]], np.float32)}, "gives 1 as a log-prob"),
    ],
)
def test_numbers_of_our_own_server_are_checked(changed, words):
    check_numbers(good(), 100, "http://there")
    with pytest.raises(ScoringServerError, match=f"^http://there.*{words}"):
        check_numbers(good(**changed), 100, "http://there")


def test_what_is_asked_for_fits(kind, engine, monkeypatch):
    """The bound follows from the request: with the fixed part gone, the largest honest answer still fits."""
    for module in (http, vllm, sglang):
        monkeypatch.setattr(module, "SMALL_ANSWER", 0)
    engine.max_logprobs = -1
    seen = []
    engine.faults = [changed(lambda answer: seen.append(len(json.dumps(answer))))]
    with serving(engine) as url:
        endpoint = http.Endpoint(url)
        source = KINDS[kind][1](endpoint, vocab_size=61, **({"model": "tiny"} if kind == "vllm" else {}))
        source.score([np.arange(40)], 61)
    assert seen[0] < bounded.NUMBER_BYTES * 40 * 63
