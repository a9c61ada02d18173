"""Rows against the model that will read them: its embedding, and where its generation stops."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from qtarget.data.checks.findings import Finding
from qtarget.data.checks.flat import FlatRows
from qtarget.data.checks.tokens import Vocabulary, check_ends, check_known, check_runaway, end_marks, usual_end


def vocabulary_of(model: PreTrainedModel, tokenizer: Any) -> Vocabulary:
    """Rows of the embedding, and the end tokens of model and tokenizer; unknown and byte tokens are left to the audit."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    return Vocabulary(embedding_rows(model), end_marks(tokenizer, end_ids(model)), None, frozenset(), tokenizer.decode)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can read."""
    layer: Any = model.get_input_embeddings()
    # DeepSpeed ZeRO-3 leaves weights empty, so the layer's own count comes first
    return int(getattr(layer, "num_embeddings", None) or layer.weight.shape[0])


def end_ids(model: PreTrainedModel) -> list[int]:
    """The tokens at which generation stops."""
    given: Any = model.generation_config
    ends = getattr(given, "eos_token_id", None)
    if ends is None:
        ends = getattr(model.config.get_text_config(), "eos_token_id", None)
    return [ends] if isinstance(ends, int) else list(ends or [])


def check_with_model(rows: FlatRows, vocabulary: Vocabulary) -> list[Finding]:
    """What only the model decides: ids beyond its embedding, rows without an end, masks that run away."""
    return [*check_known(rows, vocabulary), *check_ends(rows, vocabulary), *check_runaway(rows)]


def name_end(model: PreTrainedModel, tokenizer: Any, rows: FlatRows, *, saves_model: bool) -> list[Finding]:
    """Let the saved model stop where its rows end: their end token joins ``generation_config.eos_token_id``.

    The tokenizer's own end token is left to transformers, which adds it when training starts.

    Args:
        saves_model: False for an adapter, whose folder holds no generation config: a warning is all that helps.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    end, known = usual_end(rows, end_marks(tokenizer)), end_ids(model)
    if end is None or end in known or end == tokenizer.eos_token_id:
        return []
    mark = tokenizer.convert_ids_to_tokens(end)
    where = (
        f"the rows end with {mark!r} ({end}), at which generation of this model does not stop (eos_token_id {known})"
    )
    evidence = {"end": end, "known": known}
    if not saves_model:
        step = f"an adapter saves no generation_config, so pass eos_token_id=[{end}] to generate, or set eos_token: {mark!r}"
        return [Finding("end_not_stopping", "warning", len(rows), (), f"{where}; {step}", evidence)]
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.eos_token_id = [*known, end]
    step = "added to generation_config.eos_token_id, so that the saved model stops there"
    return [Finding("end_added", "warning", len(rows), (), f"{where}; {step}", evidence)]
