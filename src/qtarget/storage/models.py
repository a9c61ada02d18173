"""Models that are whole: every weight that the architecture has, none that it has not, all of them numbers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qtarget.core.errors import ConfigError
from qtarget.storage.folders import missing_folder, whole_folder

UNLIMITED = 10**6
"""From here on a tokenizer's ``model_max_length`` is none: transformers writes 1e30 where nobody said one."""
NAMED = 4
"""Weights that an error names; the others are counted."""


def load_named(loader: Any, key: str, name: str, **options: Any) -> Any:
    """``loader.from_pretrained(name, **options)`` for a name that somebody wrote down under ``key``.

    Raises:
        ConfigError: there is nothing of that name, or it is damaged.
    """
    with loading(key, name):
        return loader.from_pretrained(name, **options)


def context_of(config: Any) -> int | None:
    """Positions that a model of this configuration was made for, stretched ones too; None where it does not say.

    Example:
        >>> from transformers import LlamaConfig
        >>> yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100, "rope_theta": 1e4}
        >>> [context_of(LlamaConfig(max_position_embeddings=n, rope_parameters=yarn)) for n in (100, 500, -1)]
        [400, 500, None]
    """
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and original:
        return max(positions, int(rope.get("factor", 1) * original))
    return positions


def room_of(config: Any, tokenizer: Any) -> int | None:
    """The same, or where the configuration does not say, what the tokenizer calls the most."""
    most = getattr(tokenizer, "model_max_length", None)
    return context_of(config) or (most if most and most < UNLIMITED else None)


def load_whole(key: str, name: str, *, allow_new_weights: bool = False, **options: Any) -> Any:
    """A causal language model by name, whole (see ``check_whole``), its weights all finite.

    Args:
        key: what the user calls it, for errors: ``model_name_or_path``, ``teacher model``.
        allow_new_weights: see ``check_whole``.
        options: for ``from_pretrained``.

    Raises:
        ConfigError: it cannot be loaded, or is not whole.
    """
    from transformers import AutoModelForCausalLM

    check_whole(key, name, allow_new_weights=allow_new_weights, **options)
    model = load_named(AutoModelForCausalLM, key, name, **options)
    check_finite(model, f"{key} {name}")
    return model


def check_whole(key: str, name: str, *, allow_new_weights: bool = False, **options: Any) -> None:
    """Compare a checkpoint's weights with its architecture, by name and shape; no weight is read.

    transformers fills a missing weight at random, and drops one that it does not know, with no more than a table in the
    log: a truncated or mixed-up folder trains, and nobody notices. An adapter's base is compared in its place.

    Args:
        allow_new_weights: take missing and unknown weights all the same, as for a head that is added on purpose.
        options: as for ``from_pretrained``; only those that decide which weights there are count.

    Raises:
        ConfigError: weights are missing, unknown or of another shape, or the folder is damaged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    kept = {name: options[name] for name in ("revision", "trust_remote_code") if options.get(name) is not None}
    base = adapter_base(name)
    if base is not None:
        check_whole(key, base, allow_new_weights=allow_new_weights, **kept)
        return
    config = load_named(AutoConfig, key, name, **kept)
    if (Path(name) / "generation_config.json").exists():
        # from_pretrained makes up a new one where this is damaged, and says nothing (transformers 5.23)
        load_named(GenerationConfig, key, name)
    if getattr(config, "quantization_config", None) is not None:
        return  # its weights have other names and shapes until the quantiser has read them
    verbosity = logging.get_verbosity()
    logging.set_verbosity(50)  # above errors: the table says what the error below says, in sixty lines
    try:
        with loading(key, name), _without_bars():
            # on the meta device names and shapes are compared, and nothing is allocated
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, device_map={"": "meta"}, ignore_mismatched_sizes=True, **kept
            )
    finally:
        logging.set_verbosity(verbosity)
    found = loaded[1]
    mismatched = {entry[0] for entry in found["mismatched_keys"]}
    if mismatched:
        raise ConfigError(
            f"{key} {name}: {listed(mismatched)} of another shape than its config.json says; config and weights are of "
            "two models: copy both from one place"
        )
    parts = [
        f"{listed(names)} {what}"
        for names, what in (
            (found["missing_keys"], "missing from the checkpoint"),
            (found["unexpected_keys"], "in the checkpoint, but not in the architecture"),
        )
        if names
    ]
    if parts and not allow_new_weights:
        raise ConfigError(
            f"{key} {name} is not whole: {'; '.join(parts)} (num_hidden_layers is "
            f"{getattr(config.get_text_config(), 'num_hidden_layers', 'unknown')}). Missing weights would start at random, "
            "unknown ones be dropped; copy the folder again and compare config.json, or set allow_new_weights: true"
        )


def save_whole(model: Any, path: Path) -> None:
    """``model.save_pretrained`` into a folder that is there whole or not at all."""
    with whole_folder(path) as beside:
        model.save_pretrained(beside)


def adapter_base(name: str) -> str | None:
    """The model that a folder with a PEFT adapter belongs to, or None for a model of its own.

    Raises:
        ConfigError: its adapter_config.json is broken.
    """
    file = Path(name) / "adapter_config.json"
    if not file.is_file() or (Path(name) / "config.json").is_file():
        return None
    with loading("adapter", name):
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def refuse_adapter(name: str, key: str = "model_name_or_path") -> None:
    """Training starts from a model of its own.

    Raises:
        ConfigError: an adapter is named.
    """
    if adapter_base(name) is not None:
        raise ConfigError(
            f"{key} {name} is an adapter; name the model that it belongs to, or make both one first: `qtarget merge {name}`"
        )


def check_finite(model: Any, what: str) -> None:
    """Refuse weights that are NaN or infinite; of a split model, those that are here.

    Raises:
        ConfigError: names the first such weights.
    """
    bad = [name for name, value in model.named_parameters() if value.is_floating_point() and not _finite(value)]
    if bad:
        raise ConfigError(
            f"{what}: {listed(bad)} not finite (NaN or infinite), so every loss would be; the run that saved it had diverged, "
            "or its file is damaged: take an earlier checkpoint"
        )


def check_vocabulary(model: Any, tokenizer: Any, what: str) -> None:
    """Refuse a tokenizer whose ids go beyond the model's embedding.

    Raises:
        ConfigError: says both sizes.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    rows = getattr(model.config.get_text_config(), "vocab_size", None)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if rows is not None and highest >= rows:
        raise ConfigError(
            f"{what}: its tokenizer has ids up to {highest}, its embedding {rows} rows; the tokenizer is another model's, or "
            "tokens were added without model.resize_token_embeddings(len(tokenizer)): do that and save both"
        )


def listed(names: Collection[str]) -> str:
    """The first few weights of a list, and how many there are.

    Example:
        >>> listed(["b", "a"])
        '2 weights (a, b) are'
    """
    shown = sorted(names)[:NAMED]
    more = ", ..." if len(names) > NAMED else ""
    noun, verb = ("weight", "is") if len(names) == 1 else ("weights", "are")
    return f"{len(names)} {noun} ({', '.join(shown)}{more}) {verb}"


@contextmanager
def loading(key: str, name: str) -> Iterator[None]:
    """Whatever transformers, safetensors or tokenizers raise while a model is read becomes one error of ours.

    Raises:
        ConfigError: there is nothing of that name, or its files are empty, cut off or broken.
    """
    if (words := missing_folder(name)) is not None:
        raise ConfigError(f"{key}: {words}")
    try:
        yield
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # tokenizers raises bare Exception, safetensors a class of its own
        empty = [file.name for file in sorted(Path(name).glob("*")) if file.is_file() and not file.stat().st_size]
        reason = f"{', '.join(empty)} is empty" if empty else str(error) or type(error).__name__
        raise ConfigError(
            f"{key} {name} cannot be loaded: {reason}; expected a folder that transformers can load (its files whole), "
            "or a hub name"
        ) from error


def _finite(value: Any) -> bool:
    local = value.to_local() if hasattr(value, "to_local") else value  # FSDP2 keeps a DTensor
    # a sum is NaN or infinite if any summand is, and takes one pass without a mask of the size of the weight
    return bool(local.detach().sum(dtype=_wide(local)).isfinite()) or bool(local.detach().isfinite().all())


def _wide(value: Any) -> Any:
    import torch

    return torch.float64 if value.dtype == torch.float64 or value.device.type == "cpu" else torch.float32


@contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
