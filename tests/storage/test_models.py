"""Models that are not whole: each kind of damage is refused by name, and a whole model is left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtarget.core.errors import ConfigError
from qtarget.storage.models import check_finite, check_vocabulary, check_whole, load_whole, save_whole

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, head_dim=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_whole_model_is_loaded_as_transformers_does(folder, capfd) -> None:
    ours, theirs = load_whole("model", str(folder)), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.pop(DOWN), rf"1 weight \({DOWN}\) is missing from the checkpoint .*num_hidden_layers is 3"),
        (lambda w: w.update(extra=torch.zeros(2)), r"1 weight \(extra\) is in the checkpoint, but not in the arch"),
        (lambda w: w.update({DOWN: torch.zeros(8, 4)}), rf"1 weight \({DOWN}\) is of another shape"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, edit, words) -> None:
    edit_weights(folder, edit)
    with pytest.raises(ConfigError, match=words):
        check_whole("model_name_or_path", str(folder))


@pytest.mark.parametrize(("layers", "words"), [(2, "in the checkpoint, but not"), (5, "missing from the checkpoint")])
def test_a_config_of_other_depth(folder, layers, words) -> None:
    edit_config(folder, num_hidden_layers=layers)
    with pytest.raises(ConfigError, match=rf"{words} .*\(num_hidden_layers is {layers}\)"):
        check_whole("teacher", str(folder))


def test_new_weights_are_taken_where_they_are_asked_for(folder) -> None:
    edit_weights(folder, lambda w: w.pop(DOWN))
    assert load_whole("model", str(folder), allow_new_weights=True).config.num_hidden_layers == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(folder, value) -> None:
    def spoil(weights) -> None:
        weights[DOWN][1, 2] = value

    edit_weights(folder, spoil)
    with pytest.raises(ConfigError, match=rf"1 weight \({DOWN}\) is not finite"):
        load_whole("model", str(folder))


def test_large_finite_weights_whose_sum_overflows_are_numbers() -> None:
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(layer.weight, torch.finfo(torch.float32).max)
    check_finite(layer, "model")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
            "cannot be loaded",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4000), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded: .*no file named"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"'), "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
        (lambda f: (f / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda f: shutil.rmtree(f), "there is no folder"),
    ],
    ids=["cut", "empty", "rubbish", "no weights", "broken json", "no config", "empty config", "nothing"],
)
def test_damaged_folders(folder, damage, words) -> None:
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        check_whole("model_name_or_path", str(folder))


def test_an_adapter_is_judged_by_its_base(folder, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    check_whole("model", str(tmp_path / "adapter"))
    edit_weights(folder, lambda w: w.pop(DOWN))
    with pytest.raises(ConfigError, match=rf"{folder} is not whole"):
        check_whole("model", str(tmp_path / "adapter"))


def test_a_tokenizer_that_is_larger_than_the_embedding(folder) -> None:
    from qtarget.data.embedded import base_model_path

    tokenizer, model = AutoTokenizer.from_pretrained(base_model_path()), AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"ids up to 511, its embedding 32 rows"):
        check_vocabulary(model, tokenizer, "model")
    model.resize_token_embeddings(512)
    check_vocabulary(model, tokenizer, "model")


def test_a_folder_is_there_whole_or_not_at_all(folder, tmp_path, monkeypatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "new.tmp").mkdir()  # of a run that was killed here
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", None)  # transformers has written config.json by then
        patched.setattr("transformers.modeling_utils.safe_save_file", None)
        with pytest.raises(TypeError):
            save_whole(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_whole(model, tmp_path / "new")
    check_whole("model", str(tmp_path / "new"))
    assert not (tmp_path / "new.tmp").exists()
