"""What a model is, told from its folder without reading a weight, and whether its rows may be packed."""

from __future__ import annotations

from typing import Any

from qtarget.core.errors import QTargetError, UnsupportedModelError
from qtarget.starting.choices import Size
from qtarget.storage.models import check_whole, context_of, load_named, refuse_adapter

PROBED_UP_TO = 300_000_000
"""Parameters of a model that is made anew, with random weights, to see whether packed rows stay apart."""


def size_of(name: str, **options: Any) -> Size:
    """Numbers of a model by folder or hub name.

    Args:
        options: ``revision`` and ``trust_remote_code``.

    Raises:
        ConfigError: there is no such model, it is not whole, or it is an adapter.
        UnsupportedModelError: it is no causal language model.
    """
    from transformers import AutoConfig

    refuse_adapter(name, "--model")
    config = load_named(AutoConfig, "--model", name, **options)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"--model {name} is an encoder-decoder; expected a decoder-only model such as Llama or Qwen"
        )
    check_whole("--model", name, **options)
    text = config.get_text_config()
    return Size(
        sum(parameter.numel() for parameter in _without_weights(name, config, options).parameters()),
        int(getattr(text, "num_hidden_layers", 1)),
        int(getattr(text, "hidden_size", 1)),
        int(text.vocab_size),
        context_of(config),
    )


def _without_weights(name: str, config: Any, options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=options.get("trust_remote_code"))
    except ValueError as error:
        raise UnsupportedModelError(f"--model {name} is no causal language model: {error}") from error


def keeps_packed_rows_apart(name: str, size: Size, **options: Any) -> bool | None:
    """Whether documents in one row do not see one another in this architecture; None where that was not tried."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qtarget.integrations.sft.data.collator import TargetCollator
    from qtarget.integrations.shared.heads import backbone_states
    from qtarget.integrations.shared.probes import refuse_leaks

    if size.parameters > PROBED_UP_TO:
        return None
    config = AutoConfig.from_pretrained(name, **options)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.get("trust_remote_code")).float()
    collator = TargetCollator(pad_token_id=0, padding_free=True)
    try:
        refuse_leaks(
            model, collator.of_documents, lambda inputs: backbone_states(model, inputs), "packing", trained=False
        )
    except QTargetError:
        return False
    return True
