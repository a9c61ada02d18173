"""The head probe against real architectures: hidden states, head and what the probe found must rebuild the logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qtarget.core.errors import UnsupportedModelError
from qtarget.core.types import project
from qtarget.integrations.shared.heads import HeadSpec, add_target_head, probe_head

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": ({}, HeadSpec()),
    "qwen2": ({"tie_word_embeddings": True}, HeadSpec()),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8}, HeadSpec(1.0, 30.0)),
    "cohere": ({"logit_scale": 0.0625}, HeadSpec(0.0625)),
    "granite": ({"logits_scaling": 8.0}, HeadSpec(0.125)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.04, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        HeadSpec(0.04),
    ),
    "lfm2": ({"full_attn_idxs": [1]}, HeadSpec()),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, HeadSpec()),
}


def tiny(architecture: str):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**{**SMALL, **ARCHITECTURES[architecture][0]})
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probe_finds_scale_and_softcap(architecture):
    model = tiny(architecture)
    found = probe_head(model)
    expected = ARCHITECTURES[architecture][1]
    assert found.scale == pytest.approx(expected.scale, rel=1e-5)
    assert found.softcap == expected.softcap
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head = model.get_output_embeddings()
        hidden = model.base_model(input_ids=ids).last_hidden_state
        rebuilt = project(hidden.reshape(-1, hidden.shape[-1]), head.weight, None, found.scale, found.softcap)
        expected_logits = model(input_ids=ids).logits.reshape(rebuilt.shape)
    torch.testing.assert_close(rebuilt, expected_logits, rtol=1e-4, atol=1e-5)


def test_probe_refuses_a_head_it_cannot_explain():
    model = tiny("llama")
    inner = model.forward

    def cubed(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = out.logits**3
        return out

    model.forward = cubed
    with pytest.raises(UnsupportedModelError, match="neither scale"):
        probe_head(model)


def test_probe_refuses_a_head_behind_another_layer():
    model = tiny("llama")
    head = model.lm_head
    model.lm_head = torch.nn.Sequential()
    model.lm_head.weight = head.weight
    model.lm_head.forward = lambda x: head(x.flip(-1))
    with pytest.raises(UnsupportedModelError):
        probe_head(model)


def test_probe_leaves_the_model_as_it_was():
    model = tiny("gemma2").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe_head(model)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    ids = torch.arange(5)[None]
    model.eval()
    assert float(model(ids).logits.detach().abs().max()) < 30.0  # no amplifying hook left behind


def test_target_head_runs_inside_forward_and_leaves_logits_alone():
    model = tiny("llama")
    ids = torch.arange(3, 12)[None]
    plain = model(input_ids=ids).logits.detach()
    add_target_head(model, probe_head(model))
    torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=0, atol=0)
    seen = model(input_ids=ids, target_loss=lambda hidden, weight, bias, spec: (hidden @ weight.T, bias, spec))
    torch.testing.assert_close(seen[0], plain, rtol=1e-5, atol=1e-6)
    assert seen[1:] == (None, HeadSpec())
