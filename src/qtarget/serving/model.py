"""Load the model that is served, and say who it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.core.errors import UnsupportedModelError
from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.rows import Source
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_model, fingerprint_tokenizer
from qtarget.scoring.sources.canary import CANARY, CANARY_TOKENS
from qtarget.scoring.sources.identity import Identity, Limits
from qtarget.scoring.sources.local import LocalSource
from qtarget.serving.settings import ServeSettings, check_device
from qtarget.storage.models import check_vocabulary, context_of, load_named, load_whole


@dataclass(frozen=True)
class Loaded:
    """A model in the process that the workers are forked from.

    Attributes:
        identity: of it.
        source: makes what scores, called once in each worker.
    """

    identity: Identity
    source: Callable[[], Source]


def load(settings: ServeSettings) -> Loaded:
    """A causal language model from a folder or the hub, on the CPU; workers move it to their device.

    Raises:
        UnsupportedModelError: its head is not a linear layer with a scale and soft-cap, see ``probe_head``.
        ConfigError: there is no such model, or it is not whole.
    """
    import torch
    from transformers import AutoTokenizer

    from qtarget.integrations.shared.heads import probe_head

    check_device(settings.device)
    trust = {"trust_remote_code": settings.trust_remote_code}
    dtype = "auto" if settings.dtype == "auto" else getattr(torch, settings.dtype)
    # on the CPU: a CUDA context would not survive the fork into workers
    allowed = settings.allow_new_weights
    model: Any = load_whole("model", settings.model, allow_new_weights=allowed, dtype=dtype, **trust).eval()
    tokenizer = load_named(AutoTokenizer, "tokenizer of", settings.model, **trust)
    check_vocabulary(model, tokenizer, settings.model)
    head = probe_head(model)

    def source(device: str = settings.device) -> Source:
        return LocalSource(
            model.to(device),
            logit_scale=head.scale,
            logit_softcap=head.softcap,
            tokens_per_batch=settings.padded_tokens,
        )

    here = source("cpu")
    limits = _limits(settings.limits, context_of(model.config))
    ids = tokenizer(CANARY)["input_ids"][: min(CANARY_TOKENS, limits.row_tokens, limits.tokens)]
    (canary,) = here.score([np.array(ids)], 0)
    identity = Identity(
        model_id=_model_id(settings.model),
        model_fingerprint=fingerprint_model(model),
        tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
        chat_template_fingerprint=fingerprint_chat_template(tokenizer),
        vocab_size=here.vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        versions=tool_versions() | {"mosec": version("mosec")},
        limits=limits,
        canary_ids=list(ids),
        canary_log_probs=canary.label_log_probs.tolist(),
    )
    return Loaded(identity, source)


def _model_id(name: str) -> str:
    """A hub name as it is; of a folder its last part: clients need not learn the server's paths."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _limits(limits: Limits, longest: int | None) -> Limits:
    """With the model's own maximum where no ``row_tokens`` is given.

    Raises:
        UnsupportedModelError: more is allowed than the model's positions, or neither says a maximum.
    """
    if limits.row_tokens and longest and limits.row_tokens > longest:
        raise UnsupportedModelError(
            f"row_tokens {limits.row_tokens} exceeds the model's {longest} positions; allow at most that"
        )
    if not (limits.row_tokens or longest):
        raise UnsupportedModelError("the model's config has no max_position_embeddings; say --max-row-tokens")
    return Limits(**{**vars(limits), "row_tokens": limits.row_tokens or longest})
