"""Rows against the positions of a model: looked up in a table, or computed."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from qtarget.core.errors import DataError
from qtarget.integrations.sft.rendering.model_checks import has_position_table

SMALL = {"vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=16, max_position_embeddings=32, word_embed_proj_dim=16)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, max_position_embeddings=32)),
}


@pytest.mark.parametrize(("name", "table"), [("gpt2", True), ("opt", True), ("llama", False)])
def test_a_table_of_positions_is_told_from_computed_ones(name, table):
    assert has_position_table(MODELS[name](), 32) is table


@pytest.mark.parametrize(
    "settings", [{"max_length": None}, {"max_length": 64, "packing": True, "packing_strategy": "wrapped"}]
)
def test_rows_beyond_a_table_are_refused_before_the_first_step(make_trainer, settings):
    rows = Dataset.from_list([{"text": "abcd efgh " * (5 if settings["max_length"] is None else 2)}] * 4)
    with pytest.raises(
        DataError, match=r"longer than the 32 tokens that the model was made for.*set max_length to 32 or less"
    ):
        make_trainer(model=MODELS["gpt2"](), data=rows, **settings)
    make_trainer(model=MODELS["llama"](), data=rows, **settings)  # trains, and is warned of


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_rows_beyond_the_table_of_a_frozen_model_are_refused_before_the_first_step(make_trainer, role):
    rows = Dataset.from_list([{"text": "abcd efgh " * 5}] * 4)
    target = {"teacher": "forward_kl", "reference": "sft_kl"}[role]
    frozen = {"models": {f"{role}_model": MODELS["gpt2"]()}}
    with pytest.raises(DataError, match=f"longer than the 32 tokens that the frozen {role} was made for"):
        make_trainer(model=MODELS["llama"](), data=rows, target=target, max_length=None, **frozen)
    make_trainer(model=MODELS["llama"](), data=rows, target=target, max_length=32, **frozen).train()
