"""Score the frozen model over exactly the rows, tokens and masks that training will see."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qtarget.core.errors import ConfigError
from qtarget.core.types import TailPolicy
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.preparation import changed
from qtarget.integrations.sft.preparation import logger as findings
from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.integrations.shared.step import ROLES
from qtarget.integrations.shared.teacher import compare_tokenizers
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import Manifest, fingerprint_chat_template, fingerprint_tokenizer, supervised_mask
from qtarget.scoring.sources.distributed import load_model
from qtarget.scoring.sources.engines import EngineChoice, connect
from qtarget.scoring.sources.local import LocalSource, score_rows

TIMED_ROWS = 8
LABEL_BYTES, LISTED_BYTES = 5.0, 2.6
"""Of a token: its log-prob and entropy, and each log-prob beside it (docs/cache.md measures them)."""


@dataclass(frozen=True)
class TrainingRows:
    """What training will see.

    Attributes:
        trainer: holds the model and what its head needs.
        rows: ``input_ids`` and ``labels`` each, of the training data and then the evaluation data.
        tokenizer_fingerprint, chat_template_fingerprint: of what made them.
    """

    trainer: QTargetTrainer
    rows: list[dict[str, Any]]
    tokenizer_fingerprint: str
    chat_template_fingerprint: str


def training_rows(
    model: Any, args: QTargetConfig, train_dataset: Any, eval_dataset: Any = None, processing_class: Any = None
) -> TrainingRows:
    """Tokenise, mask and truncate as training does, and stop before the first step.

    Raises:
        ConfigError: packing that cuts rows apart, or a model split by DeepSpeed ZeRO-3.
    """
    if args.packing and args.packing_strategy != "bfd":
        raise ConfigError(
            f"packing_strategy {args.packing_strategy!r} cuts rows apart, and a cache holds whole rows; use 'bfd'"
        )
    if is_deepspeed_zero3_enabled():
        raise ConfigError("scoring runs no DeepSpeed engine: leave `deepspeed` out; the cache serves every training")
    keys = [role + suffix for role in ROLES for suffix in ("", "_cache", "_model_name_or_path", "_url")]
    frozen = dict.fromkeys(keys)  # they are yet to be
    plain = changed(
        args, target="sft", target_kwargs=None, filter="none", witness=None, packing=False, eval_packing=False,
        padding_free=False, report_to=[],
        weights_scale="label",  # rows and tokens of weight 0 are scored too, so that a cache serves any weights
        **frozen,
    )  # fmt: skip
    trainer = QTargetTrainer(model, plain, None, train_dataset, eval_dataset, processing_class)
    evals: Any = trainer.eval_dataset
    sets: list[Any] = [
        trainer.train_dataset,
        *(evals.values() if isinstance(evals, dict) else [evals] if evals is not None else []),
    ]
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for part in sets for row in part]
    tokenizer = trainer.processing_class
    return TrainingRows(
        trainer,
        rows,
        fingerprint_tokenizer(tokenizer),
        fingerprint_chat_template(trainer.chat_template or tokenizer),
    )


@contextmanager
def untold(quiet: bool) -> Iterator[None]:
    """Preparation's findings are not logged inside; errors are raised as ever."""
    before = findings.level
    findings.setLevel(logging.ERROR if quiet else before)
    try:
        yield
    finally:
        findings.setLevel(before)


@dataclass(frozen=True)
class Cost:
    """What a scoring takes, about.

    Attributes:
        rows, tokens: how many; tokens are those with a label.
        bytes: on disk.
        seconds: by a few rows that were timed; None where another machine scores.
    """

    rows: int
    tokens: int
    bytes: int
    seconds: float | None


def cost_of(model: Any, rows: Sequence[Mapping[str, Any]], top_k: int, *, timed: bool) -> Cost:
    """Rows and tokens counted, bytes by the usual width of a column, time by ``TIMED_ROWS`` rows of all lengths."""
    places = [np.flatnonzero(supervised_mask(row["labels"])) for row in rows]
    tokens, seconds = sum(len(at) for at in places), None
    if timed:
        some = range(0, len(rows), max(1, len(rows) // TIMED_ROWS))
        ids = [np.asarray(rows[i]["input_ids"]) for i in some]
        begin = time.perf_counter()
        LocalSource(model).score(ids, top_k, positions=[places[i] for i in some])
        whole = sum(len(row["input_ids"]) for row in rows)
        seconds = (time.perf_counter() - begin) * whole / max(1, sum(map(len, ids)))
    return Cost(len(rows), tokens, round(tokens * (LABEL_BYTES + top_k * LISTED_BYTES)), seconds)


def score(
    model: Any,
    args: QTargetConfig,
    train_dataset: Any,
    eval_dataset: Any = None,
    processing_class: Any = None,
    *,
    directory: str | Path,
    top_k: int = 0,
    tail_policy: TailPolicy = "bucket",
    log_probs_dtype: str = "float16",
    sampled: int = 0,
    seed: int = 0,
    known: str | Path | None = None,
    model_id: str | None = None,
    progress: bool = True,
    engine: EngineChoice | None = None,
    shard_rows: int = 2000,
    announce: Callable[[Cost], None] | None = None,
) -> Manifest:
    """Write a reference cache for the training (and evaluation) rows.

    Args:
        model: the frozen model: a name, path or model.
        args: the training configuration; its data settings decide the tokens.
        top_k: how many log-probs a token to keep; 0 keeps the label's alone, which weights need; anchors and teachers
            need a distribution.
        tail_policy: see ``qtarget.Reference``.
        log_probs_dtype: of the stored top-k log-probs: ``float16``, off by at most 2**-11 of their value, or ``float32``.
        sampled, seed: draws a token instead of the top k, and where they start.
        known: a finished cache; rows that it holds are left out.
        model_id: what the manifest calls the model; default: its name or path.
        engine: who scores; default: this process. A server that is trusted needs any model of its vocabulary here.
        shard_rows: rows a shard, and the most work a kill can lose.
        announce: is told what it will take, before it begins; a training follows, which says what is wrong with the rows.

    Returns:
        The manifest of the finished cache.

    Raises:
        ConfigError: packing that cuts rows apart, or Ray with a model instead of its name.
        CacheMismatchError: the model named has another tokenizer than ``processing_class``.
        ScoringServerError: a server fails, or is not what it should be.
    """
    with untold(announce is not None):
        job = training_rows(model, args, train_dataset, eval_dataset, processing_class)
    base, tokenizer = job.trainer._base_model(), job.trainer.processing_class
    name = model if isinstance(model, str) else str(getattr(base.config, "_name_or_path", ""))
    options: Any = args.model_init_kwargs or {}
    if processing_class is not None and name:
        revision = options.get("revision") or "main"
        compare_tokenizers(tokenizer, name, revision=revision, trust_remote_code=args.trust_remote_code)
    load = partial(load_model, model, **{**options, "dtype": base.dtype}) if isinstance(model, str) else None
    model_id = model_id or name or type(base).__name__
    if announce is not None:
        announce(cost_of(base, job.rows, top_k, timed=engine is None or engine.name == "local"))
    return score_rows(
        base,
        job.rows,
        directory,
        model_id=model_id,
        tokenizer_fingerprint=job.tokenizer_fingerprint,
        chat_template_fingerprint=job.chat_template_fingerprint,
        top_k=top_k,
        tail_policy=tail_policy,
        log_probs_dtype=log_probs_dtype,
        sampled=sampled,
        seed=seed,
        known=() if known is None else ReferenceCache.open(known).checksums(),
        logit_scale=job.trainer.head_spec.scale,
        logit_softcap=job.trainer.head_spec.softcap,
        progress=progress,
        shard_rows=shard_rows,
        connect=partial(connect, engine or EngineChoice(), base, model_id=model_id, tokenizer=tokenizer, load=load),
    )
