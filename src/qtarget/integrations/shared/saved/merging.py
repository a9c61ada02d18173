"""An adapter and its base as one model: the weights merged in float32, rounded once, written whole, read again and compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from qtarget.core.errors import ConfigError, UnsupportedModelError
from qtarget.core.shapes import Tensor
from qtarget.integrations.shared.saved.ends import adopt_saved, make_saveable
from qtarget.storage.folders import whole_folder
from qtarget.storage.models import load_whole, loading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXACT, ROUNDINGS = 1e-4, 16.0
"""How far merged logits may be from the adapter's, in standard deviations of the logits: the first in float32, so many
steps of a narrower dtype."""
PROBE = (4, 24)
"""Rows and tokens of the probe."""


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        folder: of the merged model.
        dtype: of its weights.
        effect: largest change of a probe's logits by the adapter, in standard deviations of the logits.
        error: largest distance of the merged model's logits from the adapter's, in the same measure.
        notes: what its user must know.
    """

    folder: Path
    dtype: str
    effect: float
    error: float
    notes: tuple[str, ...]


def merge_adapter(
    adapter: str,
    base: str,
    tokenizer: Any,
    output: Path,
    *,
    dtype: str | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
    **options: Any,
) -> Merged:
    """Write a model of its own that computes what the adapter on its base computes; takes 4 bytes a parameter of memory.

    Args:
        adapter: folder of a PEFT adapter.
        base: the model it was trained on, a folder or hub name; a quantised one is dequantised where transformers can.
        tokenizer: saved with the model, with its chat template.
        output: a new or empty folder.
        dtype: of the weights; default: the base's.
        finish: called with the folder before it is moved to its place, for what else belongs there.
        options: for the base's ``from_pretrained``.

    Raises:
        UnsupportedModelError: an adapter that has no place in weights, or a base that cannot be dequantised.
        ConfigError: base or adapter cannot be loaded, they do not belong together, or the merged model computes otherwise.
    """
    from peft import PeftConfig, PeftModel

    with loading("adapter", adapter):
        config = PeftConfig.from_pretrained(adapter)
    refuse_unmergeable(adapter, config)
    with quiet():
        return _merge(PeftModel, adapter, base, tokenizer, output, dtype, finish, options)


def _merge(
    loader: Any,
    adapter: str,
    base: str,
    tokenizer: Any,
    output: Path,
    dtype: str | None,
    finish: Any,
    options: dict[str, Any],
) -> Merged:
    model, own, notes = load_base(base, **options)
    chosen = dtype or own
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # tokens that training added
        model.resize_token_embeddings(len(tokenizer))
    ids = probe_ids(model)
    with loading("adapter", adapter):
        wrapped = loader.from_pretrained(model, adapter)
    expected = logits_of(wrapped, ids)
    with wrapped.disable_adapter():
        before = logits_of(wrapped, ids)
    try:
        merged: Any = wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise UnsupportedModelError(
            f"peft cannot merge {adapter} into {base}: {error}; use it as an adapter"
        ) from error
    adopt_saved(merged, adapter)
    make_saveable(merged.generation_config)
    with whole_folder(output) as beside:
        merged.to(DTYPES[chosen]).save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        del merged, wrapped, model
        effect, error = compare(beside, ids, before, expected)
        refuse_difference(error, effect, chosen, output)
        finish(beside)
    if error > effect / 2 and effect > 0:
        notes.append(
            f"rounding to {chosen} takes {error / effect:.0%} of what the adapter does; --dtype float32 keeps all of it"
        )
    return Merged(output, chosen, effect, error, tuple(notes))


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for each file, and its warning of a name that PEFT 0.21 reads (``is_gradient_checkpointing``)."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def refuse_unmergeable(name: str, config: Any) -> None:
    """Raise for adapters that have no place in weights.

    Raises:
        UnsupportedModelError: see above.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise UnsupportedModelError(
            f"{name} is {kind}: it puts a learned prompt before the input, and weights have no place for one; use it as an "
            "adapter, or train LoRA"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise UnsupportedModelError(
            f"{name} is an activated LoRA, which acts after its invocation tokens alone, and merged weights act everywhere; "
            "use it as an adapter"
        )


def load_base(base: str, **options: Any) -> tuple[Any, str, list[str]]:
    """The base in float32, the name of the dtype that it is stored in, and what is to be said about it.

    Raises:
        UnsupportedModelError: it is quantised and cannot be dequantised here.
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    with loading("base", base):
        config = AutoConfig.from_pretrained(base, **kept)
    own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    own = own if own in DTYPES else "float32"
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return load_whole("base", base, dtype=torch.float32, **options), own, []
    method = (
        quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "unknown")
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(base, **options).dequantize().to(torch.float32)
    except Exception as error:  # each quantiser has its own errors, ImportError among them
        raise UnsupportedModelError(
            f"base {base} is quantised ({method}), and its weights cannot be made whole here: {error}; pass the model that it "
            "was quantised from as --base"
        ) from error
    return model, own, [f"the base is quantised ({method}); the merged model has its dequantised weights"]


def probe_ids(model: Any) -> Tensor:
    """Token ids ``[rows, time]`` from the whole vocabulary, the same for every call."""
    rows = model.get_input_embeddings().weight.shape[0]
    return torch.randint(rows, PROBE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits ``[rows, time, vocabulary]`` without dropout."""
    model.eval()
    return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def compare(folder: Path, ids: Tensor, before: Tensor, expected: Tensor) -> tuple[float, float]:
    """Read a merged model as anybody would, and measure the adapter's effect and the merge's error."""
    from transformers import AutoModelForCausalLM

    with loading("the merged model", str(folder)):
        found = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    spread = float(expected.std())
    return float((expected - before).abs().max()) / spread, float((found - expected).abs().max()) / spread


def refuse_difference(error: float, effect: float, dtype: str, output: Path) -> None:
    """Raise where a merged model does not compute what the adapter computes.

    Raises:
        ConfigError: says how far it is off.
    """
    bound = max(EXACT, 0.0 if dtype == "float32" else ROUNDINGS * torch.finfo(DTYPES[dtype]).eps)
    if not error <= bound:
        raise ConfigError(
            f"the merged model computes other logits than the adapter: off by {error:.2g} of their standard deviation, and "
            f"{dtype} explains {bound:.2g} (the adapter moves them by {effect:.2g}); {output} is not written: use the adapter as "
            "it is, or pass --dtype float32"
        )
