"""A batch taken apart: what the loss needs of it, and what the model's forward gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel

from qtarget.core.errors import ConfigError
from qtarget.core.types import FrozenHead, Reference, Target, WeightsScale
from qtarget.integrations.shared.heads import HeadSpec
from qtarget.integrations.shared.step import TargetStep, live_head, pop_reference
from qtarget.integrations.shared.teacher import truncate_reference
from qtarget.loss.backends import Backend
from qtarget.scoring.cache.reader import ReferenceCache

ROW_INPUTS = ("labels", "row_ids", "loss_weights", "label_weights", "example_ids")
"""What a batch holds for the loss beside the cached numbers; the rest is the model's."""


def split_batch(
    inputs: dict[str, Any],
    target: Target,
    caches: Mapping[str, ReferenceCache],
    frozen_models: Mapping[str, tuple[PreTrainedModel, HeadSpec]],
    *,
    num_items: Any,
    vocab_rows: int | None,
    backend: Backend,
    weights_scale: WeightsScale,
    autocast: Callable[[], AbstractContextManager[Any]],
    virtual_tokens: int = 0,
) -> tuple[TargetStep, dict[str, Any]]:
    """The loss of this batch, to be called inside the model's forward, and the inputs of that forward.

    Args:
        inputs: a collated batch; the loss's part is taken out of it.
        caches, frozen_models: by role; live models run here.
        num_items: supervised tokens of the whole optimizer batch, if known.
        vocab_rows, weights_scale, virtual_tokens: see ``TargetStep``.
        autocast: what live models run under.

    Raises:
        ConfigError: rows split across ranks.
    """
    if "shift_labels" in inputs:
        raise ConfigError("context and sequence parallelism split rows across ranks; not supported by qtarget yet")
    frozen: dict[str, Reference | FrozenHead | None] = {}
    for role, cache in caches.items():
        reference = pop_reference(inputs, role, cache.manifest.tail_policy)
        cut = role == "teacher" and vocab_rows and reference is not None
        frozen[role] = truncate_reference(reference, vocab_rows) if cut else reference  # pyright: ignore[reportArgumentType]
    extra = {name: inputs.pop(name, None) for name in ROW_INPUTS}
    for role, (model, spec) in frozen_models.items():
        with autocast():
            frozen[role] = live_head(model, spec, inputs, vocab_rows)
    step = TargetStep(
        target,
        extra["labels"],  # pyright: ignore[reportArgumentType]
        frozen,
        sequence_ids=extra["row_ids"],
        loss_weights=extra["loss_weights"],
        weights_scale=weights_scale,
        label_weights=extra["label_weights"],
        num_items=num_items,
        vocab_rows=vocab_rows,
        backend=backend,
        virtual_tokens=virtual_tokens,
    )
    return step, inputs
