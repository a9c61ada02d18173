"""Where an answer ends: the tokens at which generation stops, and what a saved model says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.storage.models import load_named

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings of a generation config that count only where tokens are drawn."""


def end_ids(generation_config: Any, config: Any = None) -> list[int]:
    """The tokens at which a model's generation stops.

    Args:
        generation_config: the model's, or None; its ``eos_token_id`` may be a number or a list.
        config: the model's, which counts where the other names none.
    """
    ends = getattr(generation_config, "eos_token_id", None)
    if ends is None and config is not None:
        ends = getattr(config.get_text_config(), "eos_token_id", None)
    return [ends] if isinstance(ends, int) else [int(end) for end in ends or []]


def stop_ids(tokenizer: Any, generation_config: Any = None, *, chat: bool = False) -> list[int]:
    """Tokens that end a completion: the model's, the tokenizer's, and the chat template's end of turn.

    Args:
        generation_config: the model's.
        chat: whether prompts are messages, so that the end of the assistant's turn counts.
    """
    found = [*end_ids(generation_config), tokenizer.eos_token_id, end_of_turn(tokenizer) if chat else None]
    return sorted({int(token) for token in found if token is not None})


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that a chat template puts after what the assistant said, or None where it puts none."""
    mark = "qtargetanswer"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], tokenize=False
        )
    except Exception:  # a template that wants other roles; the model's own end of text is left
        return None
    ids = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return ids[0] if ids and ids[0] in special else None


def turn_ends(tokenizer: Any) -> list[int]:
    """``end_of_turn`` as a list; of a tokenizer without chat template none."""
    turn = end_of_turn(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    return [] if turn is None else [turn]


def known_ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that model or chat template name as ends, also where one of them pads as well."""
    return [*end_ids(model.generation_config, model.config), *turn_ends(tokenizer)]


def add_end(model: Any, end: int) -> None:
    """Let a model's generation stop at one token more."""
    from transformers import GenerationConfig

    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    known = end_ids(model.generation_config, model.config)
    if end not in known:
        model.generation_config.eos_token_id = [*known, end]


def adopt_saved(model: Any, folder: str) -> None:
    """Give a model the generation config beside its adapter; transformers 5.23 gives it the base's alone."""
    from transformers import GenerationConfig

    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = load_named(GenerationConfig, "adapter", folder)


def make_saveable(generation_config: Any) -> list[str]:
    """Take away what would keep a generation config from being saved; returns the names of what went.

    transformers 5.23 loads settings of sampling beside ``do_sample: false`` with a warning, and refuses to save them once
    the config was changed, as every training changes it: the run would end with its first checkpoint. They have no effect.

    Raises:
        ConfigError: another fault, with which the model could not be saved.
    """
    if generation_config is None:
        return []
    idle = [name for name in SAMPLING if getattr(generation_config, name, None) is not None]
    gone = idle if idle and not generation_config.do_sample and not _is_valid(generation_config) else []
    for name in gone:
        setattr(generation_config, name, None)
    try:
        generation_config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"the model's generation_config.json could not be saved with the trained model: {error}; mend that file"
        ) from error
    return gone


def _is_valid(generation_config: Any) -> bool:
    try:
        generation_config.validate(strict=True)
    except ValueError:
        return False
    return True
