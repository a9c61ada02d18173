"""The committed model and rows: re-measured, regenerated and checked against the scripts that made them."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtarget.core.errors import DataError
from qtarget.data import tasks
from qtarget.data.embedded import DEMONSTRATION_SPLITS, base_model_path, load_demonstrations
from tests import ROOT

SCRIPTS = ROOT / "scripts"


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_model_path()).eval()


def _accuracy(model, tokenizer, rows, checker) -> float:
    batch = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=24, do_sample=False
        )
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(checker(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)


def test_the_base_model_knows_the_skills_in_its_own_format(model, tokenizer):
    rows = load_demonstrations("base_format_test") + load_demonstrations("heldout_skills_test")
    assert _accuracy(model, tokenizer, rows, tasks.check_pretraining) >= 0.9


def test_the_base_model_does_not_know_the_instruction_format(model, tokenizer):
    assert _accuracy(model, tokenizer, load_demonstrations("test")[:100], tasks.check) < 0.3


def test_the_base_model_knows_the_skills_kept_out_of_the_demonstrations(model, tokenizer):
    rows = load_demonstrations("heldout_skills_test")
    assert {row["skill"] for row in rows} == set(tasks.FORGETTING_SKILLS)
    assert _accuracy(model, tokenizer, rows, tasks.check_pretraining) >= 0.85


def test_the_model_is_small_llama_in_float32_and_is_what_its_readme_says(model):
    weights = (base_model_path() / "model.safetensors").read_bytes()
    assert len(weights) < 6_000_000
    assert model.config.model_type == "llama"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    readme = (base_model_path() / "README.md").read_text()
    assert hashlib.sha256(weights).hexdigest() in readme
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in readme


def test_the_training_log_counts_up_to_the_accuracy_claimed():
    lines = [json.loads(line) for line in (base_model_path() / "training_log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert lines[-1]["accuracy"]["overall"] >= 0.9
    for phase in ("corpus", "framed"):
        losses = [line["answer_loss"] for line in lines if line["phase"] == phase]
        assert losses[-1] < 0.2 * losses[0]


def test_the_script_rebuilds_the_committed_tokenizer(tmp_path):
    _script("train_base_model").train_tokenizer(0).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (base_model_path() / name).read_bytes(), name


def test_training_twice_gives_the_same_weights(tmp_path, tokenizer):
    script = _script("train_base_model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    phases, settings = script.training_phases(2, 2), script.Settings(1, 1, 10**6, 1)
    runs = [script.train(tokenizer, phases, settings, tmp_path / f"{run}.jsonl") for run in range(2)]
    torch.set_num_threads(threads)
    first, second = (run.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_packed_attention_stays_inside_the_document(model, tokenizer):
    script = _script("train_base_model")
    batch = next(script.packed_batches(tokenizer, script.training_phases(1, 1)[1], seed=0))
    packed = model(input_ids=batch.input_ids[:1], position_ids=batch.position_ids[:1], use_cache=False).logits[0]
    starts = [*(batch.position_ids[0] == 0).nonzero().flatten().tolist(), batch.input_ids.shape[1]]
    assert len(starts) > 3
    for start, end in itertools.pairwise(starts[:4]):
        alone = model(input_ids=batch.input_ids[:1, start:end], use_cache=False).logits[0]
        torch.testing.assert_close(packed[start:end], alone, atol=1e-4, rtol=1e-4)
        text = tokenizer.decode(batch.input_ids[0, start:end])
        assert text.endswith("<|endoftext|>")


def test_demonstrations_regenerate_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_demonstrations", "--output", str(tmp_path)])
    _script("make_demonstrations").main()
    committed = base_model_path().parent / "demonstrations"
    assert {path.name for path in committed.iterdir()} == {f"{split}.jsonl" for split in DEMONSTRATION_SPLITS}
    for split in DEMONSTRATION_SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (committed / f"{split}.jsonl").read_bytes()


def _problem_of(row: dict[str, str]) -> tuple[str, ...]:
    """Skill and question fields, read back from the prompt by matching every phrasing."""
    text = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:\n")
    found = set()
    for phrasing in tasks.SKILLS[row["skill"]].instructions:
        pattern = re.escape(phrasing).replace(r"\{0\}", "(?P<a>[A-Z0-9=, -]+)").replace(r"\{1\}", "(?P<b>[A-Z0-9]+)")
        if match := re.fullmatch(pattern, text):
            found.add((row["skill"], *(match.groupdict()[name] for name in sorted(match.groupdict()))))
    (problem,) = found
    return problem


def test_rows_are_right_different_short_and_disjoint(tokenizer):
    train, test = load_demonstrations("train"), load_demonstrations("test")
    assert (len(train), len(test)) == (1000, 300)
    for row in (*train, *test):
        assert tasks.check(row, row["completion"])
        assert row["skill"] not in tasks.FORGETTING_SKILLS
        assert len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < 64
    train_problems, test_problems = set(map(_problem_of, train)), set(map(_problem_of, test))
    assert len(train_problems) == 1000
    assert len(test_problems) == 300
    assert not train_problems & test_problems
    counts = Counter(row["skill"] for row in train)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_prompt_and_completion_are_the_tokens_of_the_chat_template(tokenizer):
    row = load_demonstrations("train")[0]
    question = row["prompt"].removeprefix("Instruction: ").removesuffix("\nResponse:\n")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["completion"]}]
    chat = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    prompt_ids = tokenizer(row["prompt"])["input_ids"]
    completion_ids = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
    assert chat["input_ids"] == prompt_ids + completion_ids
    assert chat["assistant_masks"] == [0] * len(prompt_ids) + [1] * len(completion_ids)
    assert tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id] == chat["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == prompt_ids
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Grüße, 世界 🙂\n\ttab", "KDQF 2024-03-05", "snake_case(x) -> None"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_and_upper_case_letters_are_single_tokens(tokenizer):
    for text in ("KDQFTHE", "20240305"):
        assert len(tokenizer(text)["input_ids"]) == len(text)


def test_unknown_split_lists_the_known_ones():
    with pytest.raises(DataError, match=r"unknown split 'dev'.*train, test"):
        load_demonstrations("dev")
