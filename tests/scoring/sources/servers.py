"""Local servers that answer as vLLM and SGLang do, from a real model, with faults on demand. For tests only."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Fault = Callable[[BaseHTTPRequestHandler, dict[str, Any]], bool]
"""Gets the handler and the good answer; changes the answer and returns False, or answers itself and returns True."""


class Engine:
    """What both engines share: a model, its log-probs in float32, a queue of faults, and what was asked."""

    def __init__(self, model: Any, tokenizer: Any = None, *, key: str | None = None) -> None:
        self.model, self.tokenizer, self.key = model, tokenizer, key
        self.faults: list[Fault] = []
        """Each strikes one scoring request, in order."""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._lock = threading.Lock()

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        """``[time, vocab]``: row t is about token t + 1."""
        with self._lock:
            return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def next_fault(self) -> Fault | None:
        with self._lock:
            return self.faults.pop(0) if self.faults else None


class FakeVllm(Engine):
    """``/v1/completions``, ``/v1/models``, ``/version`` and ``/tokenize`` of vLLM 0.20."""

    scoring_path = "/v1/completions"
    max_logprobs = 20

    def get(self, path: str) -> dict[str, Any] | None:
        if path == "/version":
            return {"version": "0.20.2"}
        if path == "/v1/models":
            entry = {"id": "tiny", "object": "model", "owned_by": "vllm", "root": "tiny", "max_model_len": 128}
            return {"object": "list", "data": [entry]}
        return None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"])["input_ids"]
            return 200, {"count": len(ids), "max_model_len": 128, "tokens": ids, "token_strs": None}
        if path != self.scoring_path:
            return None
        ids, wanted = body["prompt"], body["prompt_logprobs"]
        log_probs = self.log_probs(ids)
        count = log_probs.shape[-1] if wanted == -1 else wanted
        if self.max_logprobs != -1 and count > self.max_logprobs:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed: {self.max_logprobs}"
            error = {"message": message, "type": "BadRequestError", "param": "prompt_logprobs", "code": 400}
            return 400, {"error": error}
        entries: list[Any] = [None]
        for t in range(1, len(ids)):
            row = log_probs[t - 1]
            # vLLM puts the prompt's own token first and numbers the k largest from 1
            entry = {str(ids[t]): self._logprob(row, ids[t], int((row >= row[ids[t]]).sum()))}
            for rank, token in enumerate(row.topk(count).indices.tolist(), 1):
                entry[str(token)] = self._logprob(row, token, rank)
            entries.append(entry)
        choice = {
            "index": 0,
            "text": "x",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": entries,
            "prompt_token_ids": None,
        }
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1}
        return 200, {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    @staticmethod
    def _logprob(row: torch.Tensor, token: int, rank: int) -> dict[str, Any]:
        value = float(row[token])
        return {"logprob": -9999.0 if value == -float("inf") else value, "rank": rank, "decoded_token": f"<{token}>"}


class FakeSglang(Engine):
    """``/generate``, ``/v1/models``, ``/model_info`` and ``/server_info`` of SGLang 0.5; older ones know ``/get_...``."""

    scoring_path = "/generate"
    old_names = False

    def get(self, path: str) -> dict[str, Any] | None:
        prefix = "/get_" if self.old_names else "/"
        if path == "/v1/models":
            entry = {"id": "tiny", "object": "model", "owned_by": "sglang", "root": "tiny", "max_model_len": 128}
            return {"object": "list", "data": [entry]}
        if path == f"{prefix}model_info":
            return {"model_path": "tiny", "tokenizer_path": "tiny", "is_generation": True}
        if path == f"{prefix}server_info":
            return {"model_path": "tiny", "dtype": "float32", "version": "0.5.3", "internal_states": [{}]}
        return None

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        if path != self.scoring_path:
            return None
        assert body["logprob_start_len"] == 0 and body["return_logprob"]
        ids = body["input_ids"] if "input_ids" in body else self.tokenizer(body["text"])["input_ids"]
        log_probs = self.log_probs(ids)

        def triples(t: int, tokens: list[int]) -> list[list[Any]]:
            return [[float(log_probs[t - 1][token]), token, None] for token in tokens]

        later = range(1, len(ids))
        meta: dict[str, Any] = {
            "id": "1",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "completion_tokens": body["sampling_params"]["max_new_tokens"],
            "cached_tokens": 0,
            "input_token_logprobs": [[None, ids[0], None], *(triples(t, [ids[t]])[0] for t in later)],
            "output_token_logprobs": [],
        }
        if top_k := body.get("top_logprobs_num", 0):
            tops = [triples(t, log_probs[t - 1].topk(top_k).indices.tolist()) for t in later]
            meta |= {"input_top_logprobs": [None, *tops], "output_top_logprobs": []}
        if (asked := body.get("token_ids_logprob")) is not None:
            meta |= {"input_token_ids_logprobs": [None, *(triples(t, asked) for t in later)]}
            meta |= {"output_token_ids_logprobs": []}
        return 200, {"text": "", "output_ids": [], "meta_info": meta}


@contextmanager
def serving(engine: Any) -> Iterator[str]:
    """Serve on a free local port; gives the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            answer = engine.get(self.path)
            send(self, 404 if answer is None else 200, answer or {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            engine.asked.append((self.path, body))
            if engine.key and self.headers.get("authorization") != f"Bearer {engine.key}":
                send(self, 401, {"error": "Unauthorized"})
                return
            status, answer = engine.post(self.path, body) or (404, {"detail": "Not Found"})
            fault = engine.next_fault() if self.path == engine.scoring_path else None
            if fault is None or not fault(self, answer):
                send(self, status, answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(handler: BaseHTTPRequestHandler, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    handler.send_response(status)
    for name, value in {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **(headers or {}),
    }.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)


# -- faults ------------------------------------------------------------------------------------------------------


def status(code: int, headers: dict[str, str] | None = None) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
        send(handler, code, {"error": {"message": "try later", "code": code}}, headers)
        return True

    return fault


def truncated(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
    """The connection closes in the middle of the body."""
    content = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("content-type", "application/json")
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True
    return True


def half_json(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
    """A body that is whole by its length and cut as JSON: a proxy gave up."""
    content = json.dumps(answer).encode()
    send(handler, 200, content[: len(content) // 2])
    return True


def reset(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
    """RST instead of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    return True


def slow(seconds: float) -> Fault:
    def fault(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
        time.sleep(seconds)
        return False

    return fault


def changed(change: Callable[[dict[str, Any]], None]) -> Fault:
    """A whole answer with a wrong content."""

    def fault(handler: BaseHTTPRequestHandler, answer: dict[str, Any]) -> bool:
        change(answer)
        return False

    return fault
