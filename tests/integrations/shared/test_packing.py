"""Packed documents must be what they are alone: every architecture is right or refused, and docs/models.md says which."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel

from qtarget.core.errors import UnsupportedModelError
from qtarget.integrations.sft.data.collator import TargetCollator
from qtarget.integrations.sft.data.columns import ROW_IDS
from qtarget.integrations.shared.heads import backbone_states, probe_head
from qtarget.integrations.shared.probes import left_padding_leak, refuse_leaks
from tests import ROOT
from tests.integrations.architectures import ARCHITECTURES, tiny
from tests.integrations.conftest import make_tokenizer

COLLATOR = TargetCollator(pad_token_id=0, padding_free=True)
PAGE = ROOT / "docs" / "models.md"


def verdict(model, trained=True) -> str:
    """What the probe says of packing: right, leaks, or cannot run."""
    try:
        refuse_leaks(
            model, COLLATOR.of_documents, lambda inputs: backbone_states(model, inputs), "packing", trained=trained
        )
    except UnsupportedModelError as error:
        words = str(error)
    else:
        return "right"
    assert "set packing: false" in words and type(model).__name__ in words
    return "refused: leaks" if "leaks" in words else "refused: cannot run packed rows"


def logits(model, documents) -> torch.Tensor | None:
    """Of the last document, by the model's own forward with the keys of TRL's collator; None where it refuses them."""
    inputs = COLLATOR.torch_call([{"input_ids": ids, "labels": ids, ROW_IDS: [0] * len(ids)} for ids in documents])
    for name in ("labels", "row_ids", "example_ids"):
        del inputs[name]
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits[0, -len(documents[-1]) :]
    except ValueError:
        return None


def truth(name) -> str:
    """By enlarged weights and full logits of the last document, alone and behind another one."""
    model = tiny(name, scale=3.0)
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randint(3, 97, (n,), generator=generator).tolist() for n in (20, 15))
    alone, behind = logits(model, [second]), logits(model, [first, second])
    if alone is None or behind is None:
        return "refused: cannot run packed rows"
    return "right" if float((alone - behind).abs().max() / alone.abs().max()) < 1e-4 else "refused: leaks"


def head_words(name) -> str:
    try:
        spec = probe_head(tiny(name))
    except UnsupportedModelError as error:
        return "refused: " + re.sub(r"^\w+[:.] ?", "", str(error)).split(",")[0].split(";")[0]
    words = [] if spec.scale == 1 else [f"scale {spec.scale:g}"]
    return " ".join([*words, *([] if spec.softcap is None else [f"soft-cap {spec.softcap:g}"])]) or "plain"


def padding_words(name) -> str:
    model = tiny(name)
    try:
        leak = left_padding_leak(model, make_tokenizer())
    except ValueError:
        return "does not generate"
    return "right" if leak is None else "one at a time"


def table_row(name) -> str:
    head = head_words(name)
    packed = "-" if head.startswith("refused") else verdict(tiny(name))
    return f"| `{name}` | {head} | {packed} | {padding_words(name)} |"


def documented() -> dict[str, str]:
    return {line.split("`")[1]: line for line in PAGE.read_text().splitlines() if line.startswith("| `")}


def test_the_page_lists_every_architecture_tried():
    assert list(documented()) == list(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packing_is_right_or_refused(name):
    assert table_row(name) == documented()[name]
    packed = documented()[name].split("|")[3].strip()
    if packed == "-":
        return
    assert {verdict(tiny(name, scale=3.0)), verdict(tiny(name).to(torch.bfloat16))} == {packed}
    # Mamba-2's own forward drops seq_idx, which its backbone refuses on a CPU: training goes through the backbone
    assert truth(name) == packed or (name == "mamba2" and truth(name) == "refused: leaks")


def test_positions_alone_are_looked_at_too():
    """Documents do not see each other, but the second one counts on from the first."""
    model = tiny("gpt2")
    inner = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: inner(torch.arange(ids.shape[1])[None])
    with pytest.raises(UnsupportedModelError, match=r"differently behind another one than alone"):
        refuse_leaks(model, COLLATOR.of_documents, lambda i: backbone_states(model, i), "padding_free", trained=False)


def test_a_leak_of_one_kernel_of_training_alone_is_found():
    model = tiny("llama").train()
    inner = model.model.norm.forward
    model.model.norm.forward = lambda h: inner(h + 1e-3 * h.roll(12, 1) if model.model.norm.training else h)
    assert verdict(model) == "refused: leaks"
    assert model.model.norm.training


def test_dropout_is_no_leak_and_nothing_is_disturbed():
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3, embd_pdrop=0.3).train()
    model.transformer.h[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert verdict(model) == "right"
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.random.get_rng_state(), states[2])
    assert [module.training for module in model.transformer.h] == [False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- in the trainer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "key"),
    [({"packing": True}, "packing"), ({"padding_free": True, "max_length": None}, "padding_free")],
)
@pytest.mark.parametrize("name", ["mamba", "bloom", "lfm2", "gpt_oss"])
def test_the_trainer_refuses_before_the_first_step(make_trainer, name, settings, key):
    model = tiny(name, eos_token_id=1, pad_token_id=0)
    words = rf"{type(model).__name__} with attn_implementation .*set {key}: false"
    with pytest.raises(UnsupportedModelError, match=words):
        make_trainer(model=model, router_aux_loss_coef=0.0 if name == "gpt_oss" else None, **settings)
    make_trainer(model=model, router_aux_loss_coef=0.0 if name == "gpt_oss" else None)  # padded rows train


@pytest.mark.parametrize("settings", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_clean_models_pack(make_trainer, settings):
    make_trainer(packing=True, **settings).train()


def test_leaks_of_half_precision_are_found(make_trainer):
    with pytest.raises(UnsupportedModelError, match="leaks"):
        make_trainer(model=tiny("mamba").to(torch.bfloat16), packing=True, bf16=True)


def test_packed_evaluation_of_padded_training_is_refused(make_trainer, rows):
    """TRL 1.16 packs the rows, and its collator marks no ends: every model would read on."""
    with pytest.raises(UnsupportedModelError, match="set eval_packing: false"):
        make_trainer(evals=rows, eval_packing=True)
    make_trainer(eval_packing=True)  # nothing to evaluate


def test_wrapped_rows_are_said_to_read_on(make_trainer, caplog):
    make_trainer(packing=True, packing_strategy="wrapped", max_length=16)
    assert "'wrapped' marks no ends" in caplog.text


def test_a_live_teacher_that_leaks_is_refused(make_trainer):
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM .* leaks"):
        make_trainer("forward_kl", packing=True, models={"teacher_model": tiny("mamba", vocab_size=80)})


# -- kinds of model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bart", "t5", "marian", "pegasus"])
def test_encoder_decoders_are_refused_before_tokenising(make_trainer, name):
    from transformers import AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    more = {"d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 80}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 0}
    config = CONFIG_MAPPING[name](**(more if name == "t5" else {**sizes, **heads, "vocab_size": 80, "pad_token_id": 0}))
    model = AutoModelForSeq2SeqLM.from_config(config)
    words = rf"{type(model).__name__} is an encoder-decoder.*expected a decoder-only model"
    with pytest.raises(UnsupportedModelError, match=words):
        probe_head(model)
    with pytest.raises(UnsupportedModelError, match=words):
        make_trainer(model=model, data="not even looked at")


def test_bidirectional_models_are_refused():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(intermediate_size=48, **sizes)).eval()
    with pytest.raises(UnsupportedModelError, match=r"BertLMHeadModel is not a causal .*is_decoder: true"):
        probe_head(model)
    model = BertLMHeadModel(BertConfig(intermediate_size=48, is_decoder=True, **sizes)).eval()
    with pytest.raises(
        UnsupportedModelError, match="head is not a plain linear layer"
    ):  # another reason: it transforms
        probe_head(model)


# -- left padding ------------------------------------------------------------------------------------------------


def test_prompts_of_a_model_that_padding_disturbs_go_one_by_one(caplog):
    from qtarget.benchmarks.generation import greedy_completions

    tokenizer, prompts = make_tokenizer(), ["ab:", "abcdefgh:", "c:"]
    answers = {}
    for name in ("rwkv", "llama"):
        model = tiny(name, scale=2.0, vocab_size=80)
        answers[name] = [
            greedy_completions(model, tokenizer, chosen, max_new_tokens=6, batch_size=size)
            for chosen, size in ((prompts, 3), (prompts, 1))
        ]
    assert answers["rwkv"][0] == answers["rwkv"][1]
    assert answers["llama"][0] == answers["llama"][1]
    assert caplog.text.count("one at a time instead of 3") == 1 and "RwkvForCausalLM" in caplog.text


def test_packed_rows_of_a_clean_model_train_as_padded_ones(make_trainer):
    packed, padded = (
        make_trainer(packing=packing, max_length=512, per_device_train_batch_size=24, max_steps=2).train().training_loss
        for packing in (True, False)
    )
    assert packed == pytest.approx(padded, rel=1e-5)
