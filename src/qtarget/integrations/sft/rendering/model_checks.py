"""Rows against the model that will read them: its embedding, and where its generation stops."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from qtarget.data.checks.findings import Finding
from qtarget.data.checks.flat import FlatRows
from qtarget.data.checks.tokens import (
    Vocabulary,
    check_ends,
    check_known,
    check_positions,
    check_runaway,
    end_marks,
    usual_end,
)
from qtarget.integrations.shared.saved.ends import add_end, end_ids, end_of_turn, known_ends, make_saveable
from qtarget.storage.models import room_of

SPECIAL_POSITIONS = 8
"""A table of positions may have some rows more than there are positions: OPT has 2."""


def vocabulary_of(model: PreTrainedModel, tokenizer: Any) -> Vocabulary:
    """Rows of the embedding, and the end tokens of model and tokenizer; unknown and byte tokens are left to the audit."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    positions = room_of(model.config, tokenizer)
    return Vocabulary(
        embedding_rows(model), end_marks(tokenizer, known_ends(model, tokenizer)), None, frozenset(), tokenizer.decode,
        positions, positions is not None and has_position_table(model, positions),
    )  # fmt: skip


def has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model looks positions up (GPT-2, OPT), and fails beyond the last; others compute them (rotary, ALiBi)."""
    tables = [part for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    return any(
        positions <= one.num_embeddings <= positions + SPECIAL_POSITIONS and one is not model.get_input_embeddings()
        for one in tables
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids the model can read."""
    layer: Any = model.get_input_embeddings()
    # DeepSpeed ZeRO-3 leaves weights empty, so the layer's own count comes first
    return int(getattr(layer, "num_embeddings", None) or layer.weight.shape[0])


def check_with_model(rows: FlatRows, max_length: int | None, filled: bool, vocabulary: Vocabulary) -> list[Finding]:
    """What only the model decides: ids beyond its embedding, rows too long or without an end, masks that run away."""
    placed = check_positions(rows, vocabulary, max_length, filled=filled)
    return [*check_known(rows, vocabulary), *placed, *check_ends(rows, vocabulary), *check_runaway(rows)]


def name_end(model: PreTrainedModel, tokenizer: Any, rows: FlatRows | None, *, saves_model: bool) -> list[Finding]:
    """Let the saved model stop where its rows end: their end token joins ``generation_config.eos_token_id``.

    The tokenizer's own end token is left to transformers, which adds it when training starts.

    Args:
        rows: None for chats of a stream, which end as the chat template says.
        saves_model: False for an adapter: its generation config lies beside it, and has to be named.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    end = (
        end_of_turn(tokenizer) if rows is None else usual_end(rows, end_marks(tokenizer, known_ends(model, tokenizer)))
    )
    known = end_ids(model.generation_config, model.config)
    if end is None or end in known or end == tokenizer.eos_token_id:
        return []
    mark = tokenizer.convert_ids_to_tokens(end)
    where = (
        f"the rows end with {mark!r} ({end}), at which generation of this model does not stop (eos_token_id {known})"
    )
    evidence, count = {"end": end, "known": known}, 0 if rows is None else len(rows)
    add_end(model, end)
    if saves_model:
        step = "added to generation_config.eos_token_id, so that the saved model stops there"
        return [Finding("end_added", "warning", count, (), f"{where}; {step}", evidence)]
    step = (
        "the generation_config.json beside the adapter has it, but transformers and servers read the base's: pass "
        "generation_config=GenerationConfig.from_pretrained(output_dir), or make one model of both with `qtarget merge`"
    )
    return [Finding("end_not_stopping", "warning", count, (), f"{where}; {step}", evidence)]


def name_saveable(model: PreTrainedModel) -> list[Finding]:
    """Settings of the generation config that go because nobody could save them, found before training and not at its end.

    Raises:
        ConfigError: it cannot be saved for another reason.
    """
    gone = make_saveable(model.generation_config)
    if not gone:
        return []
    what = f"the model's generation_config has {', '.join(gone)} beside do_sample: false, where they do nothing"
    step = "transformers does not save that; left out, so that the model can be saved"
    return [Finding("idle_sampling", "warning", 0, (), f"{what}; {step}", {"left_out": gone})]
