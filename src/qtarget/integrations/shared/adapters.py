"""What PEFT's adapters mean for a loss that starts from hidden states, and for models that must not move."""

from __future__ import annotations

from typing import Any

import torch

from qtarget.command import command_for
from qtarget.core.errors import ConfigError, UnsupportedModelError

IN_FRONT = ("PROMPT_TUNING", "P_TUNING")
"""Methods that put embeddings in front of each row of a batch."""


def virtual_tokens(config: Any, *, shared_rows: str | None, gradient_checkpointing: bool) -> int:
    """How many hidden states a prompt-learning adapter puts in front of each row; 0 without one.

    Args:
        config: a ``PeftConfig``, or None.
        shared_rows: the setting that brings several documents into one row, if any does.

    Raises:
        UnsupportedModelError: a prompt-learning method that cannot train here.
        ConfigError: one that cannot train with these settings.
    """
    if config is None or not config.is_prompt_learning:
        return 0
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in (*IN_FRONT, "PREFIX_TUNING"):
        raise UnsupportedModelError(
            f"{kind} changes labels or needs task ids in the model's forward, which the target loss replaces; expected "
            f"{', '.join(IN_FRONT)}, PREFIX_TUNING, or an adapter inside the layers such as LoRA"
        )
    if shared_rows:
        raise ConfigError(
            f"{kind} puts its prompt in front of a row, so that only the first of the documents packed into it would have "
            f"one; set {shared_rows}: false, or use LoRA"
        )
    if kind == "PREFIX_TUNING" and gradient_checkpointing:
        raise ConfigError(
            "PREFIX_TUNING lives in the cache of keys and values, which gradient checkpointing takes away; set "
            "gradient_checkpointing: false"
        )
    return config.num_virtual_tokens if kind in IN_FRONT else 0


def adapter_config(model: Any, peft_config: Any = None) -> Any:
    """The ``PeftConfig`` that will be trained: the one given, or the active one of a ``PeftModel``; None without."""
    return peft_config or (model.active_peft_config if hasattr(model, "get_base_model") else None)


def refuse_shared_weights(role: str, frozen: torch.nn.Module, trained: Any) -> None:
    """Make sure that a frozen model is neither the trained one nor the base under the trained adapter.

    Raises:
        ConfigError: it is.
    """
    mine = {id(p) for p in trained.parameters()} if isinstance(trained, torch.nn.Module) else set()
    if any(id(p) in mine for p in frozen.parameters()):
        raise ConfigError(
            f"{role}_model shares weights with the model that is trained (the same object, or the base under its adapter): "
            "freezing it would stop the training, or training would move it; pass copy.deepcopy(model), made before the "
            f"trainer, or name it in {role}_model_name_or_path; cheapest, also for LoRA with the adapter off: score it once "
            f"(`{command_for('score', '--role', role)}`) and set {role}_cache"
        )


def without_wrapper(role: str, model: Any) -> Any:
    """The model inside a ``PeftModel``: its layers hold the adapter, active as it is.

    Raises:
        UnsupportedModelError: an adapter that works outside of the model's layers.
    """
    config = adapter_config(model)
    if config is None:
        return model
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise UnsupportedModelError(
            f"{role}_model is a PeftModel with {getattr(config.peft_type, 'value', config.peft_type)} that acts outside of the "
            "model's layers; expected an adapter inside them, such as LoRA, or a model without one"
        )
    return model.get_base_model()
