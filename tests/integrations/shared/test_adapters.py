"""PEFT beside the trainer: prompt learning against TRL's own loss, and PeftModels that are frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import (
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from trl import SFTConfig, SFTTrainer

import qtarget
from qtarget.core.errors import ConfigError, UnsupportedModelError
from qtarget.registry import get_target
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(**COMMON),
    "p-tuning": PromptEncoderConfig(encoder_hidden_size=16, **COMMON),
    "prefix tuning": PrefixTuningConfig(**COMMON),
    "prefix tuning with a projection": PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **COMMON),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_learning_trains_as_in_trl(make_trainer, tmp_path, name):
    settings = {**SETTINGS, "gradient_checkpointing": "prefix" not in name}
    theirs = SFTTrainer(
        make_model(),
        SFTConfig(str(tmp_path / "theirs"), **settings),
        train_dataset=make_rows(),
        processing_class=make_tokenizer(),
        peft_config=copy.deepcopy(PROMPTS[name]),
    )
    ours = make_trainer(peft_config=copy.deepcopy(PROMPTS[name]), **settings)
    start = {key: value.detach().clone() for key, value in ours.model.named_parameters()}
    assert theirs.train().training_loss == pytest.approx(ours.train().training_loss, rel=1e-6)
    expected = dict(theirs.model.named_parameters())
    for key, value in ours.model.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)
        assert torch.equal(value, start[key]) != value.requires_grad  # the prompt learns, and nothing else


@pytest.mark.parametrize(
    ("config", "settings", "error", "words"),
    [
        (PROMPTS["prompt tuning"], {"packing": True}, ConfigError, "PROMPT_TUNING .* packing: false"),
        (PROMPTS["prefix tuning"], {"packing": True}, ConfigError, "PREFIX_TUNING .* packing: false"),
        (
            PROMPTS["prefix tuning"],
            {"gradient_checkpointing": True},
            ConfigError,
            "PREFIX_TUNING .* gradient_checkpointing: false",
        ),
        (
            CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]),
            {},
            UnsupportedModelError,
            "CPT changes labels",
        ),
    ],
)
def test_prompt_learning_that_cannot_train_is_refused_before_tokenising(make_trainer, config, settings, error, words):
    for given in (
        {"peft_config": copy.deepcopy(config)},
        {"model": get_peft_model(make_model(), copy.deepcopy(config))},
    ):
        with pytest.raises(error, match=words):
            make_trainer(data="not even looked at", **given, **settings)


def adapted(seed: int = 3):
    """A PeftModel whose adapter does something."""
    model = get_peft_model(make_model(seed=seed), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_a_frozen_peft_model_is_its_own_logits(make_trainer, role):
    frozen, name = adapted(), {"teacher": "forward_kl", "reference": "sft_kl"}[role]
    trainer = make_trainer(name, model=make_model().eval(), models={f"{role}_model": frozen})
    batch = next(iter(trainer.get_train_dataloader()))
    ids, labels = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
    with torch.no_grad():
        trainer.model.eval()
        found = float(trainer.compute_loss(trainer.model, dict(batch)))
        mine, theirs = (model(**ids).logits[:, :-1] for model in (trainer.model, frozen))
        with frozen.disable_adapter():
            off = frozen(**ids).logits[:, :-1]
    reference = {role: qtarget.Reference.from_logits(theirs, labels)}
    without = {role: qtarget.Reference.from_logits(off, labels)}
    assert found == pytest.approx(float(qtarget.target_loss(mine, labels, get_target(name), **reference)), abs=1e-5)
    assert abs(found - float(qtarget.target_loss(mine, labels, get_target(name), **without))) > 1e-3


def test_a_frozen_prompt_is_refused(make_trainer):
    teacher = get_peft_model(make_model(seed=3), copy.deepcopy(PROMPTS["prompt tuning"]))
    with pytest.raises(UnsupportedModelError, match="teacher_model is a PeftModel with PROMPT_TUNING"):
        make_trainer("forward_kl", models={"teacher_model": teacher})


def test_a_reference_that_is_the_trained_model_is_refused(make_trainer):
    model = make_model()
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    for settings in ({}, {"peft_config": lora}):
        with pytest.raises(ConfigError, match=r"shares weights .* copy.deepcopy\(model\).*--role reference"):
            make_trainer("sft_kl", model=model, models={"reference_model": model}, data="unread", **settings)
    wrapped = get_peft_model(model, lora)
    with pytest.raises(ConfigError, match="shares weights"):
        make_trainer("sft_kl", model=wrapped, models={"reference_model": model})
    assert any(p.requires_grad for p in wrapped.parameters())
    make_trainer("sft_kl", model=make_model(), models={"reference_model": copy.deepcopy(model)}).train()
