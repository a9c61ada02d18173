"""Completions by a server: vLLM, SGLang, or any other that speaks OpenAI's ``/v1/completions``.

Prompts go as token ids, so that a server reads exactly what a model of this process would. ``stop_token_ids`` is an extension
of vLLM and SGLang (vLLM ``entrypoints/openai/completion/protocol.py``; SGLang ``srt/entrypoints/openai/protocol.py``); others
stop at the end of text that the model knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from qtarget.core.errors import ConfigError, ScoringServerError
from qtarget.evaluation.contenders import Contender
from qtarget.evaluation.generation import GREEDY, Completion, Decoding
from qtarget.scoring.sources.http import Endpoint

Engine = Literal["vllm", "sglang", "openai"]
PATH = "/v1/completions"


def served_models(endpoint: Endpoint) -> list[str]:
    """Ids that a server lists at ``/v1/models``.

    Raises:
        ScoringServerError: it fails, or lists none.
    """
    listed = endpoint.get("/v1/models").get("data")
    try:
        names = [str(entry["id"]) for entry in listed or []]
    except (TypeError, KeyError) as error:
        raise ScoringServerError(
            f"{endpoint.url}/v1/models lists no ids; is this an OpenAI-compatible server?"
        ) from error
    if not names:
        raise ScoringServerError(f"{endpoint.url} serves no model")
    return names


def match_served(
    contenders: Sequence[Contender], ids: Sequence[str], named: Mapping[str, str], url: str
) -> dict[str, str]:
    """Which contender is served under which id: named ones, and those whose path or name is an id.

    Args:
        named: contender -> id, as the user wrote it.

    Returns:
        Contender -> id; the others complete in this process.

    Raises:
        ConfigError: a name that is none, or nobody is served there.
    """
    names = [one.name for one in contenders]
    for name, served in named.items():
        if name not in names:
            raise ConfigError(f"--served {name}={served}: {name} is none of {', '.join(names)}")
        if served not in ids:
            raise ConfigError(f"--served {name}={served}: {url} serves {', '.join(ids)}")
    found = {one.name: match for one in contenders if (match := named.get(one.name) or _same(one, ids))}
    if not found:
        raise ConfigError(
            f"{url} serves {', '.join(ids)}, none of which is called {', '.join(names)}; say which is which with --served "
            f"{names[-1]}={ids[0]}"
        )
    return found


def _same(contender: Contender, ids: Sequence[str]) -> str | None:
    for served in ids:
        if served in (contender.name, contender.model):
            return served
        if Path(served).is_dir() and Path(contender.model).is_dir() and Path(served).samefile(contender.model):
            return served
    return None


def complete_served(
    endpoint: Endpoint,
    served: str,
    prompts: Sequence[Sequence[int]],
    *,
    engine: Engine,
    max_new_tokens: int,
    stops: Sequence[int],
    decoding: Decoding = GREEDY,
    stream: int = 0,
    concurrency: int = 32,
) -> list[list[Completion]]:
    """What ``generation.complete`` gives, from a server; the requests of a batch are under way together.

    Raises:
        ScoringServerError: the server fails after retries, or its answer is none.
    """

    def one(at: int) -> list[Completion]:
        body: dict[str, Any] = {
            "model": served,
            "prompt": list(prompts[at]),
            "max_tokens": max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": 1.0,
            "n": decoding.samples,
            "seed": decoding.seed * 1_000_003 + stream + at,
        }
        if engine != "openai":
            body["stop_token_ids"] = list(stops)
        return _completions(endpoint.post(PATH, body), decoding.samples, endpoint.url)

    pool = ThreadPoolExecutor(min(concurrency, len(prompts)), thread_name_prefix="completing")
    try:
        return list(pool.map(one, range(len(prompts))))
    finally:
        pool.shutdown(cancel_futures=True)


def _completions(answer: Mapping[str, Any], samples: int, url: str) -> list[Completion]:
    try:
        found = [Completion(str(c["text"]), c.get("finish_reason") != "length") for c in answer["choices"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ScoringServerError(
            f"{url}{PATH} answers without choices[].text; is this an OpenAI-compatible server?"
        ) from error
    if len(found) != samples:
        raise ScoringServerError(f"{url}{PATH} answers {len(found)} completions; expected {samples}")
    return found
