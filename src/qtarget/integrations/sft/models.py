"""The models of a run, refused where a target cannot be right with them."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from qtarget.core.errors import UnsupportedModelError
from qtarget.integrations.shared.adapters import adapter_config, refuse_shared_weights, virtual_tokens
from qtarget.integrations.shared.heads import backbone_states, refuse_encoder_decoder
from qtarget.integrations.shared.probes import refuse_leaks

logger = logging.get_logger(__name__)


def shared_rows_key(args: Any, eval_dataset: Any) -> str | None:
    """The setting that brings several documents into one row, if any does."""
    keys = ("packing", "padding_free", *(["eval_packing"] if eval_dataset is not None else []))
    return next((key for key in keys if getattr(args, key)), None)


def refuse_models(
    model: Any, args: Any, peft_config: Any, frozen: dict[str, PreTrainedModel], shared_rows: str | None
) -> int:
    """What objects tell by themselves; returns how many virtual tokens an adapter inserts.

    Args:
        frozen: models handed to the trainer that the target reads, by role.
        shared_rows: ``shared_rows_key``.

    Raises:
        UnsupportedModelError, ConfigError: see the message.
    """
    refuse_encoder_decoder(model)
    for role, other in frozen.items():
        refuse_shared_weights(role, other, model)
    return virtual_tokens(
        adapter_config(model, peft_config), shared_rows=shared_rows, gradient_checkpointing=args.gradient_checkpointing
    )


def refuse_vision_model(model: PreTrainedModel, is_processor: bool) -> None:
    """Refuse a model whose own processor was loaded beside it.

    Raises:
        UnsupportedModelError: it reads images or sound.
    """
    if is_processor:
        raise UnsupportedModelError(
            f"{type(model).__name__} comes with a processor, so it reads images or sound; a target is about text tokens: pass a "
            "text model, its tokenizer as processing_class, or use TRL's SFTTrainer"
        )


def refuse_leaking_models(
    model: Any, base: PreTrainedModel, frozen: list[PreTrainedModel], collator: Any, key: str | None, wrapped: bool
) -> None:
    """Rows that share a batch row must not see one another, in the trained model and in the frozen ones.

    Args:
        model: as it is trained, around ``base``.
        collator: makes the probe's batches.
        key: ``shared_rows_key``.
        wrapped: rows are packed without marks of their ends.
    """
    if key is None:
        return
    if wrapped:
        logger.warning(
            "packing_strategy 'wrapped' marks no ends: rows see the ones before them; 'bfd' keeps them apart"
        )
        return

    def states(inputs: dict[str, Any]) -> Any:
        return model(**inputs, target_loss=lambda hidden, *_: hidden)

    refuse_leaks(base, collator.of_documents, states, key, trained=True)
    for other in frozen:
        refuse_leaks(other, collator.of_documents, partial(backbone_states, other), key, trained=False)
