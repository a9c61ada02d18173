"""What scoring costs beyond what no scorer can avoid.

The *floor* is the backbone on the same batches and the head's matrix product in float32 on the same tokens, nothing else.
Times are CPU time. Rounds of scorer and floor alternate in one process; the ratio of a round is that of its two times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtarget.benchmarks.machine import machine
from qtarget.core.types import project
from qtarget.scoring.sources.local import LOGITS_AT_ONCE, LocalSource, evaluating, plan_batches


@dataclass(frozen=True)
class ScoringConfig:
    """The model's shape (that of SmolLM2-135M), the rows, and the effort.

    Attributes:
        width, inner, layers, heads, kv_heads, vocab: of a random Llama.
        rows: to score; lengths are log-normal, as instruction data's are.
        median, longest: tokens a row.
        supervised: share of a row's tokens, at its end.
        top_ks: each is a contender; 0 is the label alone.
        tokens_per_batch: padded tokens a forward pass.
        rounds: how often each contender runs after one round that is not counted.
        seed: of weights and rows.
    """

    width: int = 576
    inner: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 49152
    rows: int = 24
    median: int = 120
    longest: int = 512
    supervised: float = 0.5
    top_ks: tuple[int, ...] = (0, 32)
    tokens_per_batch: int = 2048
    rounds: int = 3
    seed: int = 0


def make_model(config: ScoringConfig) -> LlamaForCausalLM:
    """A random model of the configured shape, in float32."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.inner,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.longest,
            tie_word_embeddings=True,
        )
    ).eval()


def make_rows(config: ScoringConfig) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and supervised positions of each row."""
    rng = np.random.default_rng(config.seed)
    lengths = np.exp(rng.normal(np.log(config.median), 0.7, config.rows)).astype(int).clip(4, config.longest)
    rows = [rng.integers(0, config.vocab, n) for n in lengths]
    return rows, [np.arange(max(1, round(n * (1 - config.supervised))), n) for n in lengths]


@torch.no_grad()
def floor(model: Any, rows: list[np.ndarray], places: list[np.ndarray], tokens_per_batch: int) -> None:
    """The same batches through the backbone, the same tokens through the head, and no more."""
    source = LocalSource(model, tokens_per_batch=tokens_per_batch)
    weight = model.get_output_embeddings().weight
    with evaluating(model):
        for batch in plan_batches([len(row) for row in rows], tokens_per_batch):
            hidden, _ = source._hidden([rows[i] for i in batch], [places[i] for i in batch])
            for part in hidden.split(max(1, LOGITS_AT_ONCE // weight.shape[0])):
                project(part, weight, exact=True)


def run_scoring_speed(config: ScoringConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Time the local engine and its floor in turns.

    Returns:
        JSON-able: ``config``, ``machine``, ``tokens`` and ``rows`` by contender: ``seconds`` a round, their ``median``, and
        ``ratio`` to the floor of the same round (median, low, high).
    """
    model, (rows, places) = make_model(config), make_rows(config)
    source = LocalSource(model, tokens_per_batch=config.tokens_per_batch)
    contenders: dict[str, Callable[[], Any]] = {
        "floor": lambda: floor(model, rows, places, config.tokens_per_batch),
        **{f"top_k {k}": lambda k=k: source.score(rows, k, positions=places) for k in config.top_ks},
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(config.rounds + 1):
        for name, step in contenders.items():
            begin = time.process_time()
            step()
            if round_number:
                seconds[name].append(time.process_time() - begin)
        say(f"round {round_number} of {config.rounds}")
    table = {}
    for name, taken in seconds.items():
        ratios = sorted(a / b for a, b in zip(taken, seconds["floor"], strict=True))
        ratio = {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}
        table[name] = {"seconds": taken, "median": statistics.median(taken), "ratio": ratio}
    tokens = {"all": sum(map(len, rows)), "supervised": sum(map(len, places))}
    return {"config": asdict(config), "machine": machine("cpu"), "tokens": tokens, "rows": table}
