"""What does reading a cache add to a training step, and how much memory does it take?

The step is a forward and backward pass of a 135M-parameter Llama (random weights: its time does not depend on them) with an
anchored target from hidden states; the reading is what the collator does for the same batch: rows in shuffled order, spread
over the batch. The two alternate, and the ratio of medians is told.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qtarget
from qtarget.benchmarks.scoring.cache import Mode, provenance
from qtarget.core.shapes import Tensor
from qtarget.core.types import Reference
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.cache.schema import DECODED, size_on_disk
from qtarget.scoring.cache.writer import write_cache

SMOL = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Sizes of SmolLM2-135M's config."""


@dataclass(frozen=True)
class ReadingConfig:
    """Sizes: cached rows and their length, rows a step, k, counted rounds, layers of the model."""

    rows: int = 2000
    length: int = 256
    batch: int = 2
    top_k: int = 32
    rounds: int = 5
    layers: int = 30
    seed: int = 0


class RandomTeacher:
    """Numbers of the right shape that follow from the row."""

    vocab_size = SMOL["vocab_size"]

    def score(self, token_ids: Any, top_k: int, candidate_ids: Any = None, *, positions: Any = None) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``."""
        out = []
        for ids in token_ids:
            rng, n = np.random.default_rng(int(ids.sum())), len(ids) - 1
            masses = np.sort(rng.dirichlet(np.full(top_k + 1, 0.1), n), axis=1)[:, ::-1].clip(min=1e-7)
            logs = np.log(masses / masses.sum(1, keepdims=True)).astype(np.float32)
            listed = (rng.integers(0, self.vocab_size // top_k, (n, top_k)) * top_k + np.arange(top_k)).astype(np.int32)
            out.append(ScoredRow(logs[:, 0], logs[:, 1] ** 2, listed, logs[:, :-1], logs[:, -1]))
        return out


def anonymous_memory() -> int:
    """Resident bytes that belong to no file (``RssAnon``); mapped files are the page cache's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def build_model(config: ReadingConfig) -> Any:
    """A Llama of SmolLM2-135M's sizes, or with fewer layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    settings: dict[str, Any] = SMOL | {"num_hidden_layers": config.layers}
    return LlamaForCausalLM(LlamaConfig(**settings))


def train_step(model: Any, ids: Tensor, reference: Reference) -> None:
    """Forward and backward, from hidden states."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    qtarget.linear_target_loss(hidden, model.lm_head.weight, ids[:, 1:], "asft", reference=reference).backward()
    model.zero_grad(set_to_none=True)


def run_reading(config: ReadingConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Times and ratio of a step and its reading, and the memory of reading every row."""
    from qtarget.benchmarks.machine import machine

    rng = np.random.default_rng(config.seed)
    ids = rng.integers(0, SMOL["vocab_size"], (config.rows, config.length))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        write_cache(
            folder, rows, RandomTeacher(), provenance(Mode(top_k=config.top_k), SMOL["vocab_size"]), shard_rows=500
        )
        on_disk = size_on_disk(Path(folder))
        memory = read_everything(folder, config)
        decoded = sum(p.stat().st_size for p in (Path(folder) / DECODED).glob("*.arrow"))
        say(
            f"{on_disk / 2**20:.0f} MiB on disk, {decoded / 2**20:.0f} MiB decoded; memory grew by {memory / 2**20:.1f} MiB"
        )
        times = alternate(folder, ids, config, say)
    ratio = statistics.median(times["reading"]) / statistics.median(times["step"])
    say(f"reading / step: {ratio:.2%}")
    return {
        "config": asdict(config),
        "machine": machine("cpu"),
        "bytes_on_disk": on_disk,
        "bytes_decoded": decoded,
        "anonymous_bytes_added": memory,
        "seconds": times,
        "ratio": ratio,
    }


def read_everything(folder: str, config: ReadingConfig) -> int:
    """Bytes of memory added by reading every row once in shuffled order, decoded files being there."""
    # each in a cache of its own, so that decoding is over and none of its memory counts below
    for index in range(0, config.rows, 500):
        ReferenceCache.open(folder).row(index)
    cache = ReferenceCache.open(folder)
    cache.row(0)
    before = anonymous_memory()
    for index in np.random.default_rng(config.seed).permutation(config.rows):
        cache.row(int(index))
    return max(0, anonymous_memory() - before)


def alternate(
    folder: str, ids: np.ndarray, config: ReadingConfig, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of each step and of the reading for it; the first round is not counted."""
    from qtarget.integrations.sft.data.collator import cached_columns
    from qtarget.integrations.shared.step import REFERENCE_FIELDS

    cache, model = ReferenceCache.open(folder), build_model(config)
    order = np.random.default_rng(config.seed).permutation(config.rows)
    times: dict[str, list[float]] = {"reading": [], "step": []}
    for turn in range(config.rounds + 1):
        chosen = order[turn * config.batch : (turn + 1) * config.batch]
        labels = torch.from_numpy(ids[chosen])
        start = time.perf_counter()
        segments = [(b, 0, config.length, int(index)) for b, index in enumerate(chosen)]
        columns = cached_columns(cache, segments, labels, "reference", True)
        middle = time.perf_counter()
        values: dict[str, Any] = {name: columns.get(f"reference_{name}") for name in REFERENCE_FIELDS}
        reference = Reference(**values).map_tensors(lambda _, value: value[:, 1:])
        train_step(model, labels, reference)
        end = time.perf_counter()
        if turn:
            times["reading"].append(middle - start)
            times["step"].append(end - middle)
            say(f"  round {turn}: reading {middle - start:.4f} s, step {end - middle:.2f} s")
    return times
