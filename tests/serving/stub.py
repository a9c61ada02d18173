"""A scorer without a model: numbers follow from the ids, and some ids are traps. Starts as fast as a process can."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qtarget.scoring.cache.rows import ScoredRow, check_request, empty_row
from qtarget.scoring.sources.identity import Identity, Limits
from qtarget.serving.cell import REFUSED
from qtarget.serving.model import Loaded
from qtarget.serving.settings import ServeSettings

VOCAB = 100
CRASH, HANG, NATIVE_HANG, RAISE, NOT_FINITE, SLOW = 99, 98, 97, 96, 95, 94
"""Token ids that make the scorer do so; everything below 90 is plain."""


def expected(ids: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The label log-probs of the stub: they tell position, token and the one before, so mixed-up rows show."""
    ids = np.asarray(ids, dtype=np.float64)
    return (-(ids[at] + ids[at - 1] / 128 + at / 1024)).astype(np.float32)


class StubSource:
    vocab_size = VOCAB

    def score(self, token_ids, top_k, candidate_ids=None, *, positions=None) -> list[ScoredRow]:
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, VOCAB)
        return [self._row(ids, at, top_k, candidate_ids) for ids, at in zip(rows, places, strict=True)]

    def _row(self, ids: np.ndarray, at: np.ndarray, top_k: int, candidate_ids: Sequence[int] | None) -> ScoredRow:
        spring(set(ids.tolist()))
        time.sleep(0.05 * int((ids == SLOW).sum()))
        label = expected(ids, at)
        if NOT_FINITE in ids:
            label = label * np.nan
        empty = empty_row(top_k, candidate_ids, entropy=True)
        wide = {
            name: np.zeros((len(at), *value.shape[1:]), value.dtype)
            for name, value in vars(empty).items()
            if value is not None
        }
        return ScoredRow(**{**wide, "label_log_probs": label})


def spring(ids: set[int]) -> None:
    """The traps."""
    if CRASH in ids:
        ctypes.string_at(0)
    if HANG in ids:
        while True:
            time.sleep(0.05)
    if NATIVE_HANG in ids:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # what code that never returns to Python amounts to
        while True:
            time.sleep(1)
    if RAISE in ids:
        raise RuntimeError("the stub was asked to fail")


def load(settings: ServeSettings) -> Loaded:
    limits = Limits(**{**vars(settings.limits), "row_tokens": settings.limits.row_tokens or 64})
    ids = [3, 1, 4, 1, 5]
    identity = Identity(
        model_id="stub",
        model_fingerprint=f"stub {settings.model}",
        tokenizer_fingerprint="tokenizer",
        chat_template_fingerprint="template",
        vocab_size=VOCAB,
        dtype="float32",
        versions={"qtarget": "0"},
        limits=limits,
        canary_ids=ids,
        canary_log_probs=expected(np.array(ids), np.arange(1, 5)).tolist(),
    )
    return Loaded(identity, StubSource)


def load_named(settings: ServeSettings) -> Loaded:
    """The model is what its file says at the moment."""
    return load(replace(settings, model=Path(settings.model).read_text()))


def load_without_cell(settings: ServeSettings) -> Loaded:
    """As on a system that lets nobody make a network namespace; the pipeline is the process's main module."""
    main = sys.modules["__main__"]

    def refused(folder: Path, program: Path) -> Path:
        (folder / REFUSED).write_text("the stub says so")
        return program

    main.wrapper = refused  # pyright: ignore[reportAttributeAccessIssue]
    return load(settings)


def never(settings: ServeSettings) -> Loaded:
    Path(settings.model).touch()
    while True:
        time.sleep(1)


def fail(settings: ServeSettings) -> Loaded:
    raise OSError("no such model anywhere")


def end(settings: ServeSettings) -> Loaded:
    os._exit(0)
