"""Tiny configurations of many architectures, all random, explicit in every size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "bamba": {"attn_layer_indices": [1], **MAMBA2},
    "biogpt": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"head_dim": 8},
    "ctrl": {"dff": 48, **OLD},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "ernie4_5": {},
    "exaone4": {},
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "falcon with alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "falcon_h1": {"mamba_d_ssm": 32, **MAMBA2, "mamba_n_heads": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "glm4": {"head_dim": 8},
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "gptj": {"rotary_dim": 4, **OLD},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 16,
        **MAMBA2,
    },
    "helium": {"head_dim": 8},
    "jamba": {
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2": {"full_attn_idxs": [1]},
    "lfm3": {},
    "llama": {},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "attention_chunk_size": 16},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minimax": {
        "num_local_experts": 2,
        "head_dim": 8,
        "block_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "qwen3_next": {
        **EXPERTS,
        "shared_expert_intermediate_size": 16,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "seed_oss": {"head_dim": 8},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "xlstm": {"num_heads": 4, "embedding_dim": 32, "num_blocks": 2},
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"],
    },
}


def tiny(name: str, scale: float = 1.0, **overrides: Any) -> Any:
    """A random model in float32; matrices multiplied by ``scale`` make visible what small initial weights hide."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.split()[0]](**{**SIZES, **ARCHITECTURES[name], **overrides})
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= scale
    return model
