"""What does a cached teacher weigh, and what does caching it cost the gradient?

Errors are those of a real trained model that writes its own rows (drawn at temperature 1) and teaches a disturbed copy of
itself; every number goes through the files of a cache. Bytes at a large vocabulary come from a synthetic teacher whose ids
and probabilities fall off like those of language (about 12 distinct ids in 50 draws, as the sampling paper reports).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qtarget
from qtarget.core.shapes import Tensor
from qtarget.core.types import Reference
from qtarget.scoring.cache.columns import compact
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.cache.schema import Provenance, size_on_disk
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.local import LocalSource, inverse_cumulative

KS = (1, 4, 8, 16, 32, 64, 128)
LISTED = max(KS)
TARGETS = ("distillation", "target_sft")
BATCH = 512
"""Tokens whose gradients are summed for the error of a step."""


@dataclass(frozen=True)
class CacheConfig:
    """Effort of one comparison.

    Attributes:
        model: name or path of a real model; the embedded base by default.
        rows, length: what the real model writes.
        disturbance: of the student: noise on each weight matrix, in its standard deviation.
        vocab: of the synthetic teacher.
        tokens: of the synthetic teacher.
        draws: of the sampled mode.
        seed: of everything random.
    """

    model: str
    rows: int = 64
    length: int = 128
    disturbance: float = 0.1
    vocab: int = 151_936
    tokens: int = 4_096
    draws: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Mode:
    """How a cache is written: top k in a dtype, or draws."""

    top_k: int = 0
    sampled: int = 0
    log_probs_dtype: str = "float16"
    name: str = field(default="")


def modes(draws: int) -> list[Mode]:
    """Label statistics alone, every k, k = 32 as scored, and draws."""
    listed = [Mode(top_k=k, name=f"top {k}") for k in KS]
    exact = Mode(top_k=32, log_probs_dtype="float32", name="top 32, float32")
    return [Mode(name="label statistics"), *listed, exact, Mode(sampled=draws, name=f"{draws} draws")]


def provenance(mode: Mode, vocab: int) -> Provenance:
    """A manifest's facts; nothing is compared here."""
    return Provenance(
        model_id="benchmark",
        model_fingerprint="none",
        tokenizer_fingerprint="none",
        chat_template_fingerprint="none",
        vocab_size=vocab,
        dtype="float32",
        top_k=mode.top_k,
        tail_policy="sampled" if mode.sampled else "bucket",
        log_probs_dtype=mode.log_probs_dtype,
        sampled=mode.sampled,
        versions={},
    )


# -- bytes at a large vocabulary ---------------------------------------------------------------------------------


class SyntheticTeacher:
    """Distributions ``softmax(s (-log(id + 20) + 2.2 noise))``, s uniform in [1, 3.5]; the same for every mode.

    Ids of a byte-pair vocabulary are about ordered by frequency, which is what the first term stands for.
    """

    def __init__(self, config: CacheConfig, length: int) -> None:
        self.vocab_size = config.vocab
        generator = torch.Generator().manual_seed(config.seed)
        prior = -torch.log(torch.arange(config.vocab) + 20.0)
        self.rows: list[dict[str, list[int]]] = []
        self._numbers: dict[tuple[int, ...], tuple[ScoredRow, np.ndarray]] = {}
        for _ in range(config.tokens // length):
            noise = torch.randn(length, config.vocab, generator=generator)
            scale = torch.empty(length, 1).uniform_(1, 3.5, generator=generator)
            logits = scale * (prior + 2.2 * noise)
            log_probs = logits.log_softmax(-1)
            labels = torch.multinomial(log_probs.exp(), 1, generator=generator)
            top, ids = log_probs.topk(min(LISTED, config.vocab))
            uniforms = torch.rand(length, config.draws, generator=generator, dtype=torch.float64)
            row = ScoredRow(
                log_probs.gather(-1, labels)[:, 0].numpy(),
                -(log_probs.exp() * log_probs).sum(-1).numpy(),
                ids.numpy().astype(np.int32),
                top.numpy(),
            )
            # nothing predicts the first token of a row, so there is one that is not trained on
            tokens = [0, *labels[:, 0].tolist()]
            self.rows.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
            self._numbers[tuple(tokens)] = row, inverse_cumulative(logits, uniforms).numpy()

    def score(self, token_ids: Any, top_k: int, candidate_ids: Any = None, *, positions: Any = None) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``."""
        out = []
        for ids in token_ids:
            row, _ = self._numbers[tuple(int(i) for i in ids)]
            if not top_k:
                out.append(ScoredRow(row.label_log_probs, row.entropy))
                continue
            assert row.topk_ids is not None and row.topk_log_probs is not None
            top = row.topk_log_probs[:, :top_k]
            rest = (1 - np.exp(top.astype(np.float64)).sum(1)).clip(min=1e-12)
            tail = np.log(rest).astype(np.float32)
            out.append(ScoredRow(row.label_log_probs, row.entropy, row.topk_ids[:, :top_k], top, tail))
        return out

    def sample(self, token_ids: Any, uniforms: Any, *, positions: Any) -> list[ScoredRow]:
        """See ``qtarget.scoring.cache.rows.SamplingSource``; the draws were made beforehand."""
        found = [self._numbers[tuple(int(i) for i in ids)] for ids in token_ids]
        return [ScoredRow(row.label_log_probs, row.entropy, samples=compact(draws)) for row, draws in found]


def bytes_at_large_vocabulary(config: CacheConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes a token of all files, by mode; and how alike the synthetic teacher is to a real one."""
    length = min(256, config.tokens)
    say(f"a synthetic teacher over {config.vocab:,} ids: {config.tokens:,} tokens")
    teacher = SyntheticTeacher(config, length)
    sizes: dict[str, float] = {}
    for mode in modes(config.draws):
        if mode.top_k > config.vocab:
            continue
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_cache(folder, teacher.rows, teacher, provenance(mode, config.vocab))
            sizes[mode.name] = size_on_disk(Path(folder)) / manifest.tokens
        say(f"  {mode.name}: {sizes[mode.name]:.1f} bytes a token")
    numbers = [row for row, _ in teacher._numbers.values()]
    distinct = np.concatenate([compact(draws).sizes for _, draws in teacher._numbers.values()])
    return {
        "bytes_per_token": sizes,
        "mean_entropy": float(np.concatenate([row.entropy for row in numbers]).mean()),  # pyright: ignore[reportArgumentType, reportCallIssue]
        "mean_distinct_ids": float(distinct.mean()),
    }


# -- errors on a real model --------------------------------------------------------------------------------------


def write_rows(model: Any, config: CacheConfig) -> list[dict[str, list[int]]]:
    """Rows that the model writes itself, drawn at temperature 1; the first token is drawn from all."""
    torch.manual_seed(config.seed)
    first = torch.randint(0, model.config.vocab_size, (config.rows, 1))
    settings = {
        "attention_mask": torch.ones_like(first),
        "do_sample": True,
        "top_k": 0,
        "temperature": 1.0,
        "pad_token_id": 0,
    }
    # min as max: an end mark ends no row, so that all are of one length
    ids = model.generate(first, max_new_tokens=config.length, min_new_tokens=config.length, **settings)
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids.tolist()]


@torch.no_grad()
def log_probs_on(model: Any, rows: Sequence[dict[str, list[int]]]) -> Tensor:
    """``[tokens, vocab]``: what a model says before each token but the first."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return torch.cat([model(part).logits[:, :-1].float().log_softmax(-1) for part in ids.split(8)]).flatten(0, 1)


def disturbed(model: Any, config: CacheConfig) -> Any:
    """A copy of the model with noise on its matrices."""
    import copy

    student, generator = copy.deepcopy(model), torch.Generator().manual_seed(config.seed + 1)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += config.disturbance * parameter.std() * noise
    return student


def read_reference(folder: str | Path, tail_policy: Any) -> Reference:
    """All tokens of a cache, as training gets them."""
    rows = read_references(folder, tail_policy)
    return rows[0].map_tensors(lambda name, _: torch.cat([getattr(row, name) for row in rows]))


def read_references(folder: str | Path, tail_policy: Any) -> list[Reference]:
    """Every row of a cache, in its order; unused slots up to the widest row hold the id -1."""
    cache = ReferenceCache.open(folder)
    rows = [cache.row(index) for index in range(len(cache))]
    width = max(row["topk_ids"].shape[1] for row in rows)
    dtypes = {"topk_ids": torch.long, "topk_log_probs": torch.float32, "tail_log_mass": torch.float32}
    out = []
    for row in rows:
        fields: dict[str, Tensor] = {}
        for name in dtypes.keys() & row.keys():
            value = row[name]
            if value.ndim == 2:
                fill = -1 if name == "topk_ids" else -np.inf
                value = np.pad(value, ((0, 0), (0, width - value.shape[1])), constant_values=fill)
            fields[name] = torch.from_numpy(value).to(dtypes[name])
        out.append(Reference(**fields, tail_policy=tail_policy))
    return out


def gradient(student: Tensor, labels: Tensor, target: str, teacher: Reference) -> Tensor:
    """Of the summed loss, on the logits ``[tokens, vocab]``."""
    logits = student.clone().requires_grad_(True)
    qtarget.target_loss(logits, labels, target, teacher=teacher, reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad


def relative_errors(found: Tensor, full: Tensor) -> dict[str, float]:
    """``|g - g_full| / |g_full|`` a token, and of sums over a batch of tokens, where unbiased noise averages out."""
    batches = [(a.sum(0), b.sum(0)) for a, b in zip(found.split(BATCH), full.split(BATCH), strict=True)]
    apart = torch.stack([a - b for a, b in batches]).norm() / torch.stack([b for _, b in batches]).norm()
    return {"token": float((found - full).norm() / full.norm()), "batch": float(apart)}


def reconstruction_kl(teacher: Tensor, reference: Reference) -> float | None:
    """Mean ``KL(teacher || reconstruction)`` in nats, the tail spread evenly; absent where it is infinite (draws)."""
    from dataclasses import replace

    from qtarget.core.outcomes import align

    if reference.tail_policy == "sampled":
        return None
    rebuilt = align(replace(reference, tail_policy="spread"), teacher).frozen
    return float((teacher.exp() * (teacher - rebuilt)).sum(-1).mean())


def errors_on_real_model(config: CacheConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """Bytes, KL and gradient errors of every mode, on rows of the model's own."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    rows = write_rows(model, config)
    teacher, student = log_probs_on(model, rows), log_probs_on(disturbed(model, config), rows)
    labels = torch.tensor([row["input_ids"][1:] for row in rows]).flatten()
    vocab = teacher.shape[-1]
    say(f"{Path(config.model).name}: {len(labels):,} tokens of its own, {vocab:,} ids")
    full = {t: gradient(student, labels, t, Reference(log_probs=teacher)) for t in TARGETS}
    out: dict[str, Any] = {}
    for mode in (m for m in modes(config.draws) if m.top_k <= vocab):
        with tempfile.TemporaryDirectory() as folder:
            write_cache(folder, rows, LocalSource(model), provenance(mode, vocab))
            entry: dict[str, Any] = {"bytes_per_token": size_on_disk(Path(folder)) / len(labels)}
            if mode.top_k or mode.sampled:
                reference = read_reference(folder, "sampled" if mode.sampled else "bucket")
                entry["kl"] = reconstruction_kl(teacher, reference)
                allowed = [t for t in TARGETS if not mode.sampled or qtarget.get_target(t).linear_in_frozen]
                entry["gradient_error"] = {
                    t: relative_errors(gradient(student, labels, t, reference), full[t]) for t in allowed
                }
        out[mode.name] = entry
        say(f"  {mode.name}: " + ", ".join(f"{k} {v}" for k, v in entry.items()))
    return {
        "modes": out,
        "tokens": len(labels),
        "vocab": vocab,
        "teacher_entropy": float(-(teacher.exp() * teacher).sum(-1).mean()),
        "student_kl": float((teacher.exp() * (teacher - student)).sum(-1).mean()),
    }


def run_cache(config: CacheConfig, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Both tables, with what made them."""
    from qtarget.benchmarks.machine import machine

    named = asdict(config) | {"model": Path(config.model).name}
    real = errors_on_real_model(config, say)
    return {
        "config": named,
        "machine": machine("cpu"),
        "real": real,
        "large_vocabulary": bytes_at_large_vocabulary(config, say),
    }
