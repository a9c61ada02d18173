"""Cards of runs made in Python: what they say, what the hub reads, and that nothing of the user's is lost."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("trl")

from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig

from qtarget.core.errors import ConfigError, DataError
from qtarget.integrations.shared.saved.ends import make_saveable
from qtarget.report.card.document import card_document
from tests.integrations.conftest import make_model, make_rows


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_card_says_target_data_cache_and_results(make_trainer, cached, tmp_path):
    evals = make_rows(6, seed=3)
    cache = cached(evals=evals, model_id="/home/somebody/models/tiny")
    trainer = make_trainer("asft", target_kwargs={"kl_weight": 0.07}, reference_cache=cache, evals=evals)
    trainer.train()
    numbers = trainer.evaluate()
    trainer.save_model()
    out = tmp_path / "out"
    card, record = card_of(out), json.loads((out / "qtarget_run.json").read_text())
    for words in (
        "`asft`, kl_weight = 0.07", "KL(p_ref", "https://arxiv.org/abs/2509.23753", f"`{record['data']['train']['fingerprint']}`",
        "a cache of 30 rows, top 80 of tiny", record["frozen"]["reference"]["fingerprint"], "| learning_rate | 0.001 |",
        f"{numbers['eval_nll']:.4g}", f"trl {record['versions']['trl']}",
    ):  # fmt: skip
        assert words in card.text, words
    assert str(tmp_path) not in card.content and "/home" not in card.content
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert {"trl", "sft", "qtarget", "generated_from_trainer", "arxiv:2509.23753"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    assert result.metric_type == "nll" and result.metric_value == pytest.approx(numbers["eval_nll"], abs=1e-6)


def test_checkpoints_and_adapters_have_cards_too(make_trainer, tmp_path):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = make_trainer(model=model, peft_config=lora, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-3"):
        card = card_of(folder)
        assert card.data.library_name == "peft" and card.data.base_model is None and "lora" in card.data.tags
        assert "| adapter: r | 2 |" in card.text and "| adapter: target_modules | q_proj, v_proj |" in card.text
        assert "[More Information Needed]" not in card.text and str(tmp_path) not in card.content
        assert "base, not on the hub" in card.text and "GenerationConfig.from_pretrained(place)" in card.text
        assert GenerationConfig.from_pretrained(folder).eos_token_id == 1


def test_a_card_that_somebody_edited_is_kept(make_trainer, tmp_path, caplog):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    text = (out / "README.md").read_text() + "\nDo not use for medicine.\n"
    (out / "README.md").write_text(text)
    trainer.create_model_card(model_name="out")
    assert (out / "README.kept-1.md").read_text() == text
    assert "Do not use" not in (out / "README.md").read_text()
    trainer.create_model_card(model_name="out")
    assert not (out / "README.kept-2.md").exists()
    (out / "README.md").write_text("# Mine\n")
    trainer.save_model()
    assert (out / "README.kept-2.md").read_text() == "# Mine\n" and "# out" in (out / "README.md").read_text()
    (out / "qtarget_config.yaml").write_text("{")
    trainer.save_model()  # weights are saved all the same
    assert "qtarget_config.yaml cannot be read" in caplog.text


def test_a_base_of_the_hub_is_named_in_the_metadata(make_trainer, tmp_path):
    model = make_model()
    model.config._name_or_path = model.name_or_path = "somebody/tiny-base"
    trainer = make_trainer(model=model)
    trainer.train()
    trainer.save_model()
    assert card_of(tmp_path / "out").data.base_model == "somebody/tiny-base"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"qtarget_run\.json is missing; expected the output_dir"):
        card_document(tmp_path)


def test_settings_that_could_not_be_saved_are_found_before_training(make_trainer, tmp_path):
    def base(**settings):
        model = make_model()
        model.save_pretrained(tmp_path / "base")
        path = tmp_path / "base/generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    model = base(do_sample=False, temperature=0.6, top_p=0.9)
    model.generation_config.pad_token_id = 2  # as TRL does
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path / "premise")
    trainer = make_trainer(model=base(do_sample=False, temperature=0.6, top_p=0.9))
    assert any("temperature, top_p beside do_sample: false" in line for line in trainer.preparation.audits["train"])
    trainer.train()
    trainer.save_model()
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature is None
    drawn = base(do_sample=True, temperature=0.6).generation_config
    assert make_saveable(drawn) == [] and drawn.temperature == 0.6
    broken = make_model().generation_config
    broken.max_new_tokens = -3
    with pytest.raises(ConfigError, match=r"generation_config\.json could not be saved"):
        make_saveable(broken)
