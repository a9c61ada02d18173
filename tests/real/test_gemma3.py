"""A real vocabulary of 262,144 tokens: Gemma 3 270M through the doors where its size matters. Skipped without its packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from qtarget.benchmarks.real import model as real

MISSING = "" if real.GEMMA3.is_installed else f"not installed: {real.GEMMA3.install}"
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(bool(MISSING), reason=MISSING)]

VOCABULARY = 262_144
TEXTS = ["The capital of France is Paris.", "Two and two  are 4.\n\n\tfour", "Привет, 世界! 🙂"]
ROWS = [{"prompt": f"The capital of {land} is", "completion": f" {city}."} for land, city in
        (("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo"), ("Peru", "Lima"))]  # fmt: skip
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
    "max_steps": 1, "per_device_train_batch_size": 2, "max_length": 64, "activation_checkpointing": False, "seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return real.prepared(tmp_path_factory.mktemp("real") / "gemma3", real.GEMMA3)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_folder_is_whole_and_its_tokenizer_loses_nothing(folder, tokenizer):
    from qtarget.storage.models import check_whole

    check_whole("model", str(folder))
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == []
    config = json.loads((folder / "config.json").read_text())
    assert (config["vocab_size"], len(tokenizer), config["dtype"]) == (VOCABULARY, VOCABULARY, "bfloat16")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_head_is_plain_and_the_model_knows_what_it_read(folder, tokenizer):
    from qtarget.integrations.shared.heads import HeadSpec, probe_head

    model = loaded(folder).eval()
    assert probe_head(model) == HeadSpec()
    assert sum(value.numel() for value in model.parameters()) == real.GEMMA3.parameters
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert ids.shape == (1, 8)
    with torch.no_grad():
        sound, shuffled = (float(model(input_ids=x, labels=x).loss) for x in (ids, ids[:, [0, 6, 2, 7, 1, 4, 5, 3]]))
    assert sound < 4 < shuffled


@pytest.mark.parametrize("target", ["sft", "asft"])
def test_a_step_from_a_cache_begins_at_the_models_own_loss(folder, tokenizer, tmp_path, target):
    """The cache's ids need four bytes here; the loss is transformers' own before the first step."""
    from peft import LoraConfig

    from qtarget import QTargetConfig, QTargetTrainer
    from qtarget.integrations.sft.score import score
    from qtarget.scoring.cache.reader import ReferenceCache

    data, model = Dataset.from_list(ROWS[:2]), loaded(folder)
    score(
        model.eval(), QTargetConfig(str(tmp_path / "s"), **SETTINGS), data, None, tokenizer,
        directory=tmp_path / "cache", top_k=64, progress=False,
    )  # fmt: skip
    cache = ReferenceCache.open(tmp_path / "cache")
    total, count = 0.0, 0
    for i, row in enumerate(ROWS[:2]):
        start = len(tokenizer(row["prompt"])["input_ids"])
        whole = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([whole])).logits[0, start - 1 : -1].log_softmax(-1)
        labels = torch.tensor(whole[start:])
        told = log_probs.gather(-1, labels[:, None])[:, 0]
        kept = cache.row(i)
        assert torch.allclose(torch.from_numpy(kept["label_log_probs"]).float(), told, atol=2e-3)
        ours = torch.from_numpy(kept["topk_ids"]).long().sort().values
        assert (ours == log_probs.topk(64).indices.sort().values).float().mean() > 0.95
        total, count = total - float(told.sum()), count + len(labels)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    args = QTargetConfig(str(tmp_path / "t"), target=target, reference_cache=str(tmp_path / "cache"), **SETTINGS)
    trainer = QTargetTrainer(loaded(folder), args, None, data, None, tokenizer, peft_config=adapter)
    trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "nll" in line]
    assert logged["nll"] == pytest.approx(total / count, rel=1e-3)
