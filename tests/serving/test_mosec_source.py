"""A served model gives the numbers of the same model here; servers that are not what they should be are refused."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from qtarget.core.errors import DataError, HyperparameterError, ScoringServerError
from qtarget.data.embedded import base_model_path, load_demonstrations
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_model, fingerprint_tokenizer
from qtarget.scoring.sources.http import Retries
from qtarget.scoring.sources.local import LocalSource
from qtarget.scoring.sources.mosec import MosecSource, mosec_connection
from tests.scoring.helpers import VOCAB, tiny_model
from tests.scoring.sources.source_suite import SourceSuite
from tests.serving.helpers import running

FAST = Retries(attempts=4, first=0.01)


def serve(model, *options: str, **environment: str):
    command = [sys.executable, "-m", "qtarget.cli.main", "serve", str(model), "--port", "0", *options]
    return running(command, **environment)


@pytest.fixture(scope="module")
def embedded():
    """The embedded model behind the command itself, with two workers and a token from the environment."""
    with serve(base_model_path(), "--workers", "2", "--max-top-k", "16", QTARGET_API_KEY="a-token") as server:
        yield server


class TestMosec(SourceSuite):
    """The suite that every engine passes, through HTTP and three stages."""

    @pytest.fixture(scope="class")
    def source(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("tiny")
        tiny_model().save_pretrained(folder)
        words = {chr(33 + i): i for i in range(VOCAB)}
        inner = Tokenizer(models.WordLevel(words, unk_token="!"))
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="!").save_pretrained(folder)
        with serve(folder) as server:
            yield MosecSource(server.url)

    def test_what_it_says_of_itself(self, source):
        model = tiny_model()
        assert source.identity.model_fingerprint == fingerprint_model(model)
        assert source.identity.limits.row_tokens == model.config.max_position_embeddings
        with pytest.raises(DataError, match=r"row 1 of 129 tokens is beyond the server's limits \(128"):
            source.score([np.array([1, 2]), np.ones(129, int)], 0)

    def test_one_connection_serves_many_threads_of_rows_in_order(self, source):
        rng = np.random.default_rng(0)
        rows = [rng.integers(0, VOCAB, int(n)) for n in rng.integers(2, 120, 150)]
        done: list[int] = []
        counting = MosecSource(source._endpoint.url, on_tokens=done.append, concurrency=7)
        local = LocalSource(tiny_model())
        for there, here in zip(counting.score(rows, 3), local.score(rows, 3), strict=True):
            np.testing.assert_allclose(there.label_log_probs, here.label_log_probs, atol=1e-5)
            np.testing.assert_allclose(there.topk_log_probs, here.topk_log_probs, atol=1e-5)
        assert sum(done) == sum(len(row) - 1 for row in rows)
        assert len(done) > 10
        counting.close()


def test_the_trained_embedded_model_scores_there_as_here(embedded):
    model = AutoModelForCausalLM.from_pretrained(base_model_path()).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    rows = [np.array(tokenizer(r["prompt"] + r["completion"])["input_ids"]) for r in load_demonstrations("test")[:40]]
    source = MosecSource(embedded.url, token="a-token")
    connection = mosec_connection(source, model, tokenizer, model_id="base")
    assert (connection.model_id, connection.model_fingerprint) == ("base", fingerprint_model(model))
    assert source.identity.tokenizer_fingerprint == fingerprint_tokenizer(tokenizer)
    assert source.identity.chat_template_fingerprint == fingerprint_chat_template(tokenizer)
    assert (source.identity.dtype, source.identity.model_id) == ("float32", "base_model")
    for row, scored in zip(rows, source.score(rows, 8, [0, 5]), strict=True):
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor(row)[None]).logits[0, :-1].double().log_softmax(-1)
        at_label = log_probs.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        np.testing.assert_allclose(scored.label_log_probs, at_label, atol=2e-5)
        np.testing.assert_allclose(scored.topk_log_probs, log_probs.topk(8).values, atol=2e-5)
        np.testing.assert_allclose(scored.entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-4)
        np.testing.assert_allclose(scored.candidate_log_probs, log_probs[:, [0, 5]], atol=2e-5)


def test_limits_are_kept_before_anything_is_sent(embedded):
    source = MosecSource(embedded.url, token="a-token")
    with pytest.raises(HyperparameterError, match="top_k 17 exceeds the server's 16; start it with --max-top-k"):
        source.score([np.array([1, 2])], 17)
    with pytest.raises(ScoringServerError, match="answers 401"):
        MosecSource(embedded.url, token="wrong")


def test_another_model_or_tokenizer_is_refused(embedded):
    model = AutoModelForCausalLM.from_pretrained(base_model_path())
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    source = MosecSource(embedded.url, token="a-token")
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    with pytest.raises(
        ScoringServerError, match=f"model_fingerprint is '{source.identity.model_fingerprint}', expected"
    ):
        mosec_connection(source, model, tokenizer, model_id="base")
    assert mosec_connection(source, model, tokenizer, model_id="x", trust_server=True).model_id == "base_model"
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ScoringServerError, match=r"tokenizer_fingerprint is .*serve the model that the configuration"):
        mosec_connection(source, model, tokenizer, model_id="x", trust_server=True)
    with pytest.raises(ScoringServerError, match="vocab_size is 512, expected 600; "):
        source.require(vocab_size=600, dtype="float32")


class Relay:
    """Passes requests on to a server, and may spoil answers: each entry of ``faults`` is used for one ``/score``."""

    def __init__(self, url: str) -> None:
        self.faults: list = []
        self.identity: dict = {}
        self.asked = 0
        relay = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, kind, body = relay.upstream.ask(self.path, None, Authorization="Bearer a-token")
                self.answer(status, kind, json.dumps(json.loads(body) | relay.identity).encode())

            def do_POST(self):
                relay.asked += 1
                body = self.rfile.read(int(self.headers["content-length"]))
                answer = relay.upstream.ask(self.path, body, Authorization="Bearer a-token")
                fault = relay.faults.pop(0) if relay.faults else lambda *whole: whole
                self.answer(*fault(*answer))

            def answer(self, status, kind, body, length=None):
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def relay(embedded):
    relay = Relay(embedded.url)
    relay.upstream = embedded
    yield relay
    relay.server.shutdown()
    relay.server.server_close()


def status(code):
    return lambda *_: (code, "application/json", b'{"error": "later"}')


@pytest.mark.parametrize(
    "fault",
    [
        *map(status, (408, 429, 502, 503)),
        lambda code, kind, body: (code, kind, body[:40], len(body)),  # the connection ends early
        lambda code, kind, body: (code, kind, body[:40]),  # whole, but half a message
    ],
    ids=["408", "429", "502", "503", "cut", "half"],
)
def test_what_passes_is_asked_again(relay, fault):
    source = MosecSource(relay.url, retries=FAST)
    before = relay.asked
    relay.faults = [fault, fault]
    (scored,) = source.score([np.array([5, 9, 3])], 2)
    assert relay.asked == before + 3
    assert scored.topk_ids.shape == (2, 2)


def test_retries_end(relay):
    source = MosecSource(relay.url, retries=FAST)
    relay.faults = [status(429)] * 9
    with pytest.raises(ScoringServerError, match="failed 4 times, at last with: HTTP 429 later"):
        source.score([np.array([5, 9])], 0)
    assert len(relay.faults) == 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(500), "refuses with HTTP 500: later"),
        (status(422), "refuses with HTTP 422: later"),
        (
            lambda *_: (200, "text/plain", b"no data provided"),
            "answers text/plain, expected application/msgpack: 'no data",
        ),
        (lambda code, kind, body: (code, kind, body.replace(*renamed(body))), "serves other weights"),
    ],
    ids=["500", "422", "text", "other weights"],
)
def test_what_does_not_pass_is_not_asked_again(relay, fault, words):
    source = MosecSource(relay.url, retries=FAST)
    relay.faults = [fault]
    before = relay.asked
    with pytest.raises(ScoringServerError, match=words):
        source.score([np.array([5, 9])], 0)
    assert relay.asked == before + 1


def renamed(body: bytes) -> tuple[bytes, bytes]:
    """The fingerprint in an answer, and another of the same length."""
    start = body.index(b"model") + 7
    return body[start : start + 32], b"0" * 32


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"engine": "vllm"}, "is engine 'vllm', wire version 1"),
        ({"wire_version": 2}, "wire version 2; expected 'qtarget', 1"),
        ({"surprise": 1}, "is unreadable"),
        ({"canary_log_probs": [-1.0]}, "does not answer what its model computes: .* by up to inf"),
        ({"canary_ids": [3, 4], "canary_log_probs": [-99.0]}, "differ by up to [0-9.]+ nats, expected at most 0.02"),
    ],
)
def test_connecting_checks_who_answers(relay, told, words):
    relay.identity = told
    with pytest.raises(ScoringServerError, match=words):
        MosecSource(relay.url, retries=FAST)
