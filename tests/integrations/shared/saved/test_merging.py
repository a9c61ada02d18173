"""Merged adapters against the adapter on its base, a matrix product written out, and merges that must not happen."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtarget.core.errors import ConfigError, UnsupportedModelError
from qtarget.integrations.shared.saved.merging import merge_adapter
from tests.integrations.conftest import make_model, make_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A function that saves a base and an adapter with random weights, and returns both folders."""

    def save(config=None, dtype=torch.float32, scale=0.5):
        make_model().to(dtype).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        lora = get_peft_model(
            model, config or LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"])
        )
        generator = torch.Generator().manual_seed(1)
        for name, value in lora.named_parameters():
            if "lora_B" in name:
                value.data = scale * torch.randn(value.shape, generator=generator)
        lora.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter"), str(tmp_path / "base")

    return save


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_a_merged_weight_is_the_base_plus_the_product(saved, tmp_path):
    adapter, base = saved()
    found = merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged")
    inside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).state_dict()
    stem = "base_model.model.model.layers.0.self_attn.q_proj."
    product = inside[stem + "lora_B.default.weight"] @ inside[stem + "lora_A.default.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = weights(base)[name] + 8 / 3 * product  # lora_alpha is 8 by default
    torch.testing.assert_close(weights(tmp_path / "merged")[name], expected, rtol=1e-5, atol=1e-6)
    assert found.effect > 0.1 and found.error < 1e-4 and found.dtype == "float32"
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == make_tokenizer().chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_the_dtype_is_the_bases_or_the_one_asked_for(saved, tmp_path):
    adapter, base = saved(dtype=torch.bfloat16)
    tokenizer = make_tokenizer()
    assert merge_adapter(adapter, base, tokenizer, tmp_path / "own").dtype == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "own").dtype == torch.bfloat16
    merge_adapter(adapter, base, tokenizer, tmp_path / "wide", dtype="float32")
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    small, wide = weights(tmp_path / "own"), weights(tmp_path / "wide")
    assert all(torch.equal(small[name], wide[name].bfloat16().float()) for name in wide)  # rounded once


def test_an_adapter_below_the_dtypes_steps_is_named(saved, tmp_path):
    adapter, base = saved(dtype=torch.bfloat16, scale=1e-4)
    (note,) = merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged").notes
    assert "rounding to bfloat16 takes" in note and "--dtype float32" in note


def test_a_merge_that_computes_otherwise_leaves_nothing(saved, tmp_path, monkeypatch):
    adapter, base = saved()
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self, **_: self.unload(), raising=False)
    with pytest.raises(ConfigError, match="computes other logits than the adapter"):
        merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_a_kill_left_is_cleared(saved, tmp_path):
    adapter, base = saved()
    (tmp_path / "merged.tmp").mkdir()
    (tmp_path / "merged.tmp/model-00001-of-00009.safetensors").write_text("half")
    merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("model-*")) and not (tmp_path / "merged.tmp").exists()


def test_what_has_no_place_in_weights_is_refused(saved, tmp_path):
    adapter, base = saved(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="PREFIX_TUNING: it puts a learned prompt before the input"):
        merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged")


def test_a_quantised_base_that_cannot_be_opened_is_refused_with_the_reason(saved, tmp_path):
    adapter, base = saved()
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(
        UnsupportedModelError, match=r"quantised \(gptq\), and its weights cannot be made whole here: .+--base"
    ):
        merge_adapter(adapter, base, make_tokenizer(), tmp_path / "merged")


def test_another_base_is_refused(saved, tmp_path):
    adapter, _ = saved()
    make_model(hidden_size=16, intermediate_size=32).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"adapter .* cannot be loaded"):
        merge_adapter(adapter, str(tmp_path / "other"), make_tokenizer(), tmp_path / "merged")
