"""How much do length-sorted sub-batches bring a server under load? Against naive padding, and against no batching.

Three servers of the same random model, each in processes of its own, get the same requests from the same number of
clients, one server at a time and in turns. A client sends its next request when the last one is answered.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from qtarget.benchmarks.machine import machine
from qtarget.core.errors import ConfigError, ServingError
from qtarget.scoring.sources.wire import CONTENT_TYPE, pack_request, unpack_answer

VARIANTS: dict[str, list[str]] = {
    "sorted": [],
    "naive padding": ["--tokens-per-batch", str(2**31)],
    "batch size 1": ["--max-batch", "1"],
}
"""Options of ``qtarget serve`` beside the shared ones; naive: the whole batch is padded to its longest row."""


@dataclass(frozen=True)
class ServingConfig:
    """Size and effort of the load test.

    Attributes:
        clients: that ask at the same time.
        requests: of all clients together, in each round of each variant.
        rounds: counted; medians are quoted.
        shortest, longest: tokens of a row.
        typical: median of the log-normal lengths before they are clipped.
        spread: standard deviation of the logarithm of a length.
        top_k: log-probs a position.
        width, layers, vocab: of the random Llama.
        workers: that score, one thread each.
        seed: of lengths, ids and weights.
    """

    clients: int = 32
    requests: int = 640
    rounds: int = 5
    shortest: int = 8
    longest: int = 384
    typical: int = 56
    spread: float = 0.9
    top_k: int = 8
    width: int = 144
    layers: int = 4
    vocab: int = 512
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.shortest <= self.typical <= self.longest:
            raise ConfigError(
                f"shortest {self.shortest}, typical {self.typical}, longest {self.longest}; expected ascending, from 2 tokens"
            )
        if not 0 <= self.top_k <= self.vocab:
            raise ConfigError(f"top_k {self.top_k} exceeds vocab {self.vocab}; choose a smaller k")


def run_serving(config: ServingConfig, report: Callable[[str], None]) -> dict[str, Any]:
    """Requests a second, latencies and ratios of every variant, with the machine's facts.

    Raises:
        ServingError: a server does not start, or answers anything but numbers.
    """
    with TemporaryDirectory(prefix="qtarget-") as folder:
        save_model(config, Path(folder))
        rounds = asyncio.run(_measure(config, Path(folder), report))
    return {
        "config": asdict(config),
        "variants": {name: " ".join(options) or "defaults" for name, options in VARIANTS.items()},
        "machine": machine("cpu") | {"load_before_and_after": rounds.pop("load")},
        "lengths": describe_lengths(row_lengths(config)),
        "rounds": rounds,
        "summary": summarise(rounds),
    }


def save_model(config: ServingConfig, folder: Path) -> None:
    """A random Llama of the asked size, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from qtarget.data.embedded import base_model_path

    torch.manual_seed(config.seed)
    heads = 4
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.width * 8 // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=max(config.longest, 64),
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model_path()).save_pretrained(folder)


def row_lengths(config: ServingConfig) -> np.ndarray:
    """``[requests]``: log-normal, as instruction data are, clipped."""
    rng = np.random.default_rng(config.seed)
    lengths = np.exp(rng.normal(np.log(config.typical), config.spread, config.requests))
    return np.clip(np.rint(lengths), config.shortest, config.longest).astype(int)


def describe_lengths(lengths: np.ndarray) -> dict[str, float]:
    """Quantiles, and what padding groups of 16, the server's batches, to their longest costs."""
    groups = [lengths[i : i + 16] for i in range(0, len(lengths), 16)]
    return {
        "mean": float(lengths.mean()),
        **{f"p{q}": float(np.percentile(lengths, q)) for q in (5, 50, 95)},
        "padded_over_real_in_arrival_order": float(sum(len(g) * g.max() for g in groups) / lengths.sum()),
    }


def summarise(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; ratios are taken within a round."""
    out: dict[str, Any] = {}
    for name, runs in rounds.items():
        ratios = [
            a["requests_per_second"] / b["requests_per_second"] for a, b in zip(rounds["sorted"], runs, strict=True)
        ]
        out[name] = {
            **{key: statistics.median(run[key] for run in runs) for key in runs[0]},
            "sorted_is_faster_by": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        }
    return out


async def _measure(config: ServingConfig, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    load = [os.getloadavg()]
    rounds: dict[str, Any] = {name: [] for name in VARIANTS}
    async with AsyncExitStack() as stack:
        urls = {}
        for name, options in VARIANTS.items():
            urls[name] = await stack.enter_async_context(_server(folder, config, options))
        for number in range(config.rounds + 1):
            for name, url in urls.items():
                seconds, latencies = await _load(url, config)
                if number:  # the first round warms caches and allocators
                    rounds[name].append(
                        {
                            "requests_per_second": config.requests / seconds,
                            **{f"p{q}_ms": float(np.percentile(latencies, q) * 1000) for q in (50, 99)},
                        }
                    )
                    last = rounds[name][-1]
                    report(
                        f"round {number} {name}: {last['requests_per_second']:.1f} requests/s, p99 {last['p99_ms']:.0f} ms"
                    )
    return {**rounds, "load": [*load, os.getloadavg()]}


@asynccontextmanager
async def _server(folder: Path, config: ServingConfig, options: list[str]) -> AsyncIterator[str]:
    """The URL of ``qtarget serve`` in a process of its own."""
    shared = ["--port", "0", "--workers", str(config.workers), "--max-top-k", str(max(1, config.top_k))]
    command = [sys.executable, "-m", "qtarget.cli.main", "serve", str(folder), *shared, *options]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode()
        if not line:
            raise ServingError(f"{' '.join(command)} ended with code {await process.wait()}; see its message above")
        yield line.split()[0]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _load(url: str, config: ServingConfig) -> tuple[float, list[float]]:
    """Seconds for all requests, and of each."""
    import aiohttp

    rng = np.random.default_rng(config.seed + 1)
    # one iterator for all clients: each takes the next request, and none is sent twice
    bodies: Iterator[tuple[int, bytes]] = iter(
        [
            (int(n), pack_request([rng.integers(0, config.vocab, n)], [np.arange(1, n)], config.top_k, None))
            for n in row_lengths(config)
        ]
    )
    latencies: list[float] = []

    async def client(session: aiohttp.ClientSession) -> None:
        for length, body in bodies:
            begin = time.perf_counter()
            async with session.post(url + "/score", data=body, headers={"content-type": CONTENT_TYPE}) as answer:
                content = await answer.read()
            latencies.append(time.perf_counter() - begin)
            if answer.status != 200:
                raise ServingError(f"the server answered {answer.status} under load: {content[:200]!r}")
            unpack_answer(content, [length - 1], config.top_k, None)

    token = os.environ.get("QTARGET_API_KEY")
    headers = {"Authorization": f"Bearer {token}"} if token else None
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as session:
        begin = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(config.clients):
                group.create_task(client(session))
        return time.perf_counter() - begin, latencies
