"""Score rows with a model in this process."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from qtarget.core.errors import HyperparameterError, IncompatibleError, UnsupportedModelError
from qtarget.core.shapes import Tensor
from qtarget.core.statistics import statistics_of
from qtarget.core.types import TailPolicy, project
from qtarget.scoring.cache.columns import compact
from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.rows import IntArray, ScoredRow, Source, check_request, empty_row
from qtarget.scoring.cache.schema import Manifest, Provenance, fingerprint_model
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.logits import spend_logits

LOGITS_AT_ONCE = 2**25
"""Logits that exist at once, 128 MiB in float32; softmax and top-k need a few times that."""

CACHED_LOGITS = 2**21
"""Logits of which a processor's cache holds a good part: passes over them run from there."""


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group rows of similar length; longest first, so that a lack of memory shows in the first batch.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: rows times longest length stays within it; a longer row is a batch by itself.

    Returns:
        Indices into ``lengths``; the same for the same lengths.

    Example:
        >>> plan_batches([2, 9, 3, 2], tokens_per_batch=6)
        [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards every module is in the mode it was in."""
    # one by one: a frozen part may be in another mode than the rest
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class LocalSource:
    """A causal language model in this process: its backbone on whole rows, its head on supervised tokens only.

    Rows are batched by length and padded on the right; a row's numbers depend on its batch by float rounding only
    (a model whose rotary frequencies follow the longest row of a batch, such as dynamic NTK or longrope beyond its
    original context, is the exception: give it ``tokens_per_batch=1``).

    Args:
        model: with ``base_model(...).last_hidden_state`` and output embeddings; on its device, in its dtype.
        logit_scale, logit_softcap: ``logits = softcap(scale (h W^T + b))``.
        tokens_per_batch: padded tokens a forward pass.
        on_tokens: called with the number of supervised tokens after each batch.

    Raises:
        UnsupportedModelError: an encoder-decoder, or a head that is missing, quantised or wrapped by an adapter.
        HyperparameterError: ``tokens_per_batch`` is not positive.
    """

    def __init__(
        self,
        model: Any,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        tokens_per_batch: int = 8192,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        self._weight, self._bias = head_of(model)
        if tokens_per_batch < 1:
            raise HyperparameterError(f"tokens_per_batch={tokens_per_batch}; expected at least 1")
        self._model = model
        self._scale, self._softcap = logit_scale, logit_softcap
        self._tokens_per_batch = tokens_per_batch
        self._on_tokens = on_tokens

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self._weight.shape[0]

    @torch.no_grad()
    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``.

        Raises:
            UnsupportedModelError: the backbone returns no ``last_hidden_state``.
            DataError, HyperparameterError: see ``check_request``.
        """
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, self.vocab_size)
        wanted = [i for i, at in enumerate(places) if len(at)]
        out = [empty_row(top_k, candidate_ids, entropy=True) for _ in rows]
        for members, hidden, labels in self._batches(rows, places, wanted):
            numbers = self._statistics(hidden, labels, top_k, candidate_ids)
            for i, scored in zip(members, split_rows(numbers, [len(places[i]) for i in members]), strict=True):
                out[i] = scored
        return out

    @torch.no_grad()
    def sample(
        self, token_ids: Sequence[IntArray], uniforms: Sequence[np.ndarray], *, positions: Sequence[IntArray]
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.cache.rows.SamplingSource``; probabilities are summed in float64.

        Raises:
            DataError, UnsupportedModelError: as ``score``.
        """
        rows, places = check_request(token_ids, 0, None, positions, self.vocab_size)
        none = np.zeros(0, np.float32)
        out = [ScoredRow(none, none, samples=compact(np.zeros(at.shape, np.int32))) for at in uniforms]
        for members, hidden, labels in self._batches(rows, places, [i for i, at in enumerate(places) if len(at)]):
            at = torch.from_numpy(np.concatenate([uniforms[i] for i in members])).to(labels.device)
            numbers, drawn = [], []
            chunk_size = max(1, LOGITS_AT_ONCE // self.vocab_size)
            for states, ids, u in zip(*(value.split(chunk_size) for value in (hidden, labels, at)), strict=True):
                logits = self._logits(states)
                # not ``spend_logits``: the draws need the logits afterwards
                numbers.append(statistics_of(logits, ids, 0))
                drawn.append(inverse_cumulative(logits, u))
            joined = {name: torch.cat([n[name] for n in numbers]) for name in numbers[0]}
            counts = [len(places[i]) for i in members]
            draws = np.split(torch.cat(drawn).cpu().numpy(), np.cumsum(counts)[:-1])
            for i, scored, part in zip(members, split_rows(joined, counts), draws, strict=True):
                out[i] = replace(scored, samples=compact(part))
        return out

    def _batches(
        self, rows: Sequence[np.ndarray], places: Sequence[np.ndarray], wanted: Sequence[int]
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Rows of a batch, hidden states that predict their wanted tokens, and those tokens."""
        with evaluating(self._model):
            for batch in plan_batches([len(rows[i]) for i in wanted], self._tokens_per_batch):
                members = [wanted[i] for i in batch]
                hidden, labels = self._hidden([rows[i] for i in members], [places[i] for i in members])
                yield members, hidden, labels
                if self._on_tokens:
                    self._on_tokens(len(labels))

    def _logits(self, hidden: Tensor) -> Tensor:
        return project(hidden, self._weight, self._bias, self._scale, self._softcap, exact=True)

    def _statistics(
        self, hidden: Tensor, labels: Tensor, top_k: int, candidate_ids: Sequence[int] | None
    ) -> dict[str, Tensor]:
        """Fields of a ``ScoredRow`` for all tokens of a batch; logits exist for some of them at a time."""
        columns = None
        if candidate_ids is not None:
            columns = torch.tensor(list(candidate_ids), dtype=torch.long, device=labels.device)
        pieces: list[dict[str, Tensor]] = []
        chunk_size = max(1, LOGITS_AT_ONCE // self.vocab_size)
        at_once = max(1, CACHED_LOGITS // self.vocab_size) if labels.device.type == "cpu" else chunk_size
        for states, at in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            # one product for many tokens, then passes over pieces of it: the product wants size, the passes the cache
            logits = self._logits(states).split(at_once)
            for piece, ids in zip(logits, at.split(at_once), strict=True):
                pieces.append(spend_logits(piece, ids, top_k, columns))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _hidden(self, rows: Sequence[np.ndarray], places: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Hidden states ``[tokens, width]`` that predict the wanted tokens, and those tokens ``[tokens]``."""
        ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.from_numpy(row)
            mask[b, : len(row)] = 1
        device = self._model.device
        output = self._model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise UnsupportedModelError(
                f"{type(self._model).__name__}.base_model returns no last_hidden_state; expected a plain causal "
                "language model; of a PEFT model merge the adapter first, or score its base model"
            )
        batch = torch.from_numpy(np.concatenate([np.full(len(at), b) for b, at in enumerate(places)]))
        place = torch.from_numpy(np.concatenate(places))
        hidden = states[batch.to(states.device), place.to(states.device) - 1]
        return hidden.to(self._weight.device), ids[batch, place].to(self._weight.device)


def inverse_cumulative(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draws ``[tokens, n]``: the first id at which the cumulative probability exceeds each number ``[tokens, n]``."""
    # in float32 a sum over a whole vocabulary would lose its rare ids
    cumulative = logits.double().softmax(-1).cumsum(-1)
    # the sum ends near one and not at it; a number rounded up to its end would find no id
    ids = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    return ids.clamp(max=logits.shape[-1] - 1)


def head_of(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight ``[vocab, width]`` and bias of the output embeddings.

    Raises:
        UnsupportedModelError: see ``LocalSource``.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder; expected a causal language model (alignment 'causal')"
        )
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise UnsupportedModelError(
            f"{name} has no floating-point output embeddings; expected a causal language model with an "
            "unquantised lm_head"
        )
    if hasattr(head, "base_layer"):
        raise UnsupportedModelError(f"the lm_head of {name} carries an adapter; merge it, or score the base model")
    return weight, getattr(head, "bias", None)


def split_rows(numbers: Mapping[str, Tensor], counts: Sequence[int]) -> list[ScoredRow]:
    """Cut the fields of a ``ScoredRow``, given for all tokens of a batch, into rows of so many tokens."""
    ends = np.cumsum(counts)[:-1]
    types = {"topk_ids": np.int32}
    parts: dict[str, list[Any]] = {
        name: np.split(value.cpu().numpy().astype(types.get(name, np.float32)), ends) for name, value in numbers.items()
    }
    return [ScoredRow(**{name: values[i] for name, values in parts.items()}) for i in range(len(counts))]


@dataclass(frozen=True)
class Connection:
    """A source that is ready, and what the manifest says of it.

    Attributes:
        source: the engine.
        model_id, model_fingerprint, dtype, engine, engine_version: see ``Provenance``.
    """

    source: Source
    model_id: str
    model_fingerprint: str
    dtype: str
    engine: str
    engine_version: str

    def provenance(self, **settings: Any) -> Provenance:
        """What the manifest says; ``settings`` are the fields of ``Provenance`` that the source does not decide."""
        return Provenance(
            model_id=self.model_id,
            model_fingerprint=self.model_fingerprint,
            vocab_size=self.source.vocab_size,
            dtype=self.dtype,
            versions=tool_versions(),
            engine=self.engine,
            engine_version=self.engine_version,
            **settings,
        )


def local_connection(model: Any, *, model_id: str, model_fingerprint: str | None = None, **options: Any) -> Connection:
    """A model of this process; ``options`` are those of ``LocalSource``.

    Raises:
        UnsupportedModelError, HyperparameterError: see ``LocalSource``.
    """
    return Connection(
        LocalSource(model, **options),
        model_id,
        model_fingerprint or fingerprint_model(model),
        str(model.dtype).removeprefix("torch."),
        "transformers",
        tool_versions()["transformers"],
    )


def score_rows(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    directory: str | Path,
    *,
    model_id: str,
    tokenizer_fingerprint: str,
    chat_template_fingerprint: str,
    model_fingerprint: str | None = None,
    top_k: int = 0,
    tail_policy: TailPolicy = "bucket",
    log_probs_dtype: str = "float16",
    sampled: int = 0,
    seed: int = 0,
    known: Container[str] = (),
    shard_rows: int = 2000,
    tokens_per_batch: int = 8192,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    progress: bool = True,
    connect: Callable[..., Connection] | None = None,
) -> Manifest:
    """Write the reference cache of a model over some rows, or go on with one that was interrupted.

    Args:
        model: the frozen causal language model; its modules' train/eval modes are restored.
        rows: ``input_ids`` and ``labels`` each, unpadded and unshifted, -100 where not trained on.
        directory: the cache's folder.
        model_id: name or path, for people.
        tokenizer_fingerprint, chat_template_fingerprint: from ``qtarget.scoring.cache.schema``.
        model_fingerprint: computed if absent.
        top_k: log-probs a token to keep; 0 keeps the label's and the entropy alone.
        tail_policy: what training lets stand for the unlisted tokens.
        log_probs_dtype: of the stored top-k log-probs: ``float16``, off by at most 2**-11 of their value, or ``float32``.
        sampled: draws a token instead of the top k (random-sampling distillation, arXiv 2503.16870; 50 there).
        seed: of the draws.
        known: checksums of rows that another cache holds already.
        shard_rows: rows a shard.
        tokens_per_batch: padded tokens a forward pass; may change between a kill and going on.
        logit_scale, logit_softcap: of the model's head, ``logits = softcap(scale (h W^T + b))``.
        progress: show a bar on a terminal.
        connect: makes another engine's source from the options of ``LocalSource``; default: the model itself.

    Returns:
        The manifest of the finished cache.

    Raises:
        IncompatibleError: ``tail_policy`` is unknown.
        ConfigError, CacheMismatchError, DataError, NonFiniteLossError: see ``write_cache``.
        UnsupportedModelError, HyperparameterError: see ``LocalSource``.
    """
    check_storage(tail_policy, log_probs_dtype)
    connect = connect or partial(local_connection, model, model_id=model_id, model_fingerprint=model_fingerprint)
    head: dict[str, Any] = {"logit_scale": logit_scale, "logit_softcap": logit_softcap}
    with TokenMeter(enabled=progress) as meter:
        connection = connect(**head, tokens_per_batch=tokens_per_batch, on_tokens=meter.advance)
        provenance = connection.provenance(
            tokenizer_fingerprint=tokenizer_fingerprint,
            chat_template_fingerprint=chat_template_fingerprint,
            top_k=top_k,
            tail_policy="sampled" if sampled else tail_policy,
            log_probs_dtype=log_probs_dtype,
            sampled=sampled,
            seed=seed,
        )
        return write_cache(
            directory, rows, connection.source, provenance, shard_rows=shard_rows, meter=meter, known=known, **head
        )


def check_storage(tail_policy: str, log_probs_dtype: str) -> None:
    """Refuse choices that no cache knows.

    Raises:
        IncompatibleError: see the message.
    """
    if tail_policy not in get_args(TailPolicy):
        raise IncompatibleError(
            f"tail_policy {tail_policy!r} is unknown; expected one of {', '.join(get_args(TailPolicy))}"
        )
    if log_probs_dtype not in ("float32", "float16"):
        raise IncompatibleError(f"log_probs_dtype {log_probs_dtype!r} is unknown; expected float32 or float16")
