"""Shared by the tests of the reference cache: tiny models, ragged rows, a source without a model."""

from __future__ import annotations

import hashlib
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtarget.scoring.cache.rows import Row, ScoredRow, check_request
from qtarget.scoring.cache.schema import Provenance, row_checksum
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.local import LocalSource

VOCAB = 61

PROCESSES = multiprocessing.get_context("forkserver")
"""Children that start in milliseconds: the server has imported what is slow to import, and nothing else runs in it."""
PROCESSES.set_forkserver_preload(["transformers.models.llama.modeling_llama", "qtarget.scoring.sources.local"])


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of a few thousand parameters, with logits far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "initializer_range": 0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def ragged_rows(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, list[int]]]:
    """Distinct rows of 1 to ``longest`` tokens under random masks; some start supervised, some have no label at all."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(1, longest + 1))
        ids = rng.integers(0, VOCAB, length).tolist()
        keep = rng.random(length) < (0.0 if index % 7 == 3 else 0.6)
        rows.append({"input_ids": ids, "labels": [t if k else -100 for t, k in zip(ids, keep, strict=True)]})
    return rows


def provenance(top_k: int = 0, **changes: Any) -> Provenance:
    """What a manifest says of a source, with names instead of fingerprints."""
    return Provenance(
        **{
            "model_id": "tiny",
            "model_fingerprint": "model",
            "tokenizer_fingerprint": "tokenizer",
            "chat_template_fingerprint": "template",
            "vocab_size": VOCAB,
            "dtype": "float32",
            "top_k": top_k,
            "tail_policy": "bucket",
            "log_probs_dtype": "float32",
            "versions": {"qtarget": "0"},
            **changes,
        }
    )


class HashSource:
    """Numbers that follow from a row's checksum alone; counts the rows that it scored."""

    vocab_size = VOCAB

    def __init__(self, top_k: int = 0) -> None:
        self.top_k = top_k
        self.scored: list[str] = []

    def score(self, token_ids, top_k, candidate_ids=None, *, positions=None) -> list[ScoredRow]:
        assert top_k == self.top_k
        checked = check_request(token_ids, top_k, candidate_ids, positions, VOCAB)
        rows = [Row(ids, at, row_checksum(ids, np.isin(np.arange(len(ids)), at))) for ids, at in zip(*checked)]
        self.scored += [row.checksum for row in rows]
        return [self.numbers(row) for row in rows]

    def numbers(self, row: Row) -> ScoredRow:
        seed = int.from_bytes(hashlib.sha256(row.checksum.encode()).digest()[:8], "little")
        rng = np.random.default_rng(seed)
        n = len(row.positions)
        label, entropy = -rng.random(n).astype(np.float32), rng.random(n).astype(np.float32)
        if not self.top_k:
            return ScoredRow(label, entropy)
        ids = rng.integers(0, VOCAB, (n, self.top_k)).astype(np.int32)
        top = -rng.random((n, self.top_k)).astype(np.float32)
        return ScoredRow(label, entropy, ids, top, -rng.random(n).astype(np.float32))


class LoggingSource:
    """A local model that notes each call in a file, before it scores: the note outlives a kill."""

    vocab_size = VOCAB

    def __init__(self, log: Path) -> None:
        self._log = log
        self._source = LocalSource(tiny_model(), tokens_per_batch=128)

    def score(self, token_ids, top_k, candidate_ids=None, *, positions=None) -> list[ScoredRow]:
        marks = np.isin(np.arange(len(token_ids[0])), positions[0])
        with self._log.open("a") as handle:
            handle.write(row_checksum(token_ids[0], marks) + "\n")
        return self._source.score(token_ids, top_k, candidate_ids, positions=positions)


def score_and_log(directory: Path, log: Path, rows: list[dict[str, list[int]]], top_k: int) -> None:
    """What the killed process runs."""
    torch.set_num_threads(1)
    write_cache(directory, rows, LoggingSource(log), provenance(top_k), shard_rows=4)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a folder; side files of reading lie in a folder of their own."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
