"""The model that bases begin with: what a scale trains, from what, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from qtarget.benchmarks import start as start_module
from qtarget.benchmarks.noise import bench
from qtarget.benchmarks.pool import check_settings
from qtarget.benchmarks.start import Scale, Start, real_texts, skill_texts, start_of, trained_start
from qtarget.cli.bench.app import app
from qtarget.core.errors import ConfigError, DataError
from qtarget.data import tasks
from qtarget.data.embedded import load_demonstrations
from tests import SHARED

TINY = Scale(
    vocab=400, width=32, layers=1, heads=2, skill_documents=400, steps=6, batch_size=4, length=64, learning_rate=3e-3,
    device="cpu",
)  # fmt: skip
TEXTS = ["The quick brown fox jumps over the lazy dog.", "A second paragraph, 42 words short."] * 20


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    return trained_start(TINY, TEXTS, tmp_path_factory.mktemp("scale") / "start", lambda text: None)


def test_a_start_is_a_model_of_its_scale_with_a_tokenizer_that_loses_nothing(start: Start) -> None:
    model, tokenizer = start.load(), start.tokenizer()
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.vocab_size) == (
        32,
        1,
        len(tokenizer),
    )
    text = "The quick FOX: 42 [a b] \u00e9\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id is not None
    assert start.rates((1e-3, 5e-4)) == pytest.approx((1e-3, 5e-4))  # a third of 3e-3 is the embedded base's
    log = json.loads(sorted(Path(start.path).glob("checkpoints/*/trainer_state.json"))[-1].read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]


def test_it_is_trained_once_and_not_mixed_with_another(start: Start) -> None:
    weights = start.load().state_dict()
    again = trained_start(TINY, TEXTS, start.path, lambda text: pytest.fail("trained again"))
    assert again == start
    assert all(torch.equal(value, weights[name]) for name, value in again.load().state_dict().items())
    for scale, texts, name in ((replace(TINY, steps=7), TEXTS, "scale"), (TINY, TEXTS[::-1], "texts")):
        with pytest.raises(ConfigError, match=f"was made with another {name}; delete it"):
            trained_start(scale, texts, start.path, lambda text: None)


def test_a_base_that_was_not_finished_is_trained_on(start: Start, tmp_path: Path) -> None:
    copy = tmp_path / "start"
    shutil.copytree(start.path, copy)
    (copy / "ready.json").unlink()  # killed while it was saved, with a checkpoint that is cut off too
    (copy / "checkpoints" / "checkpoint-99").mkdir()
    said = []
    again = trained_start(TINY, TEXTS, copy, said.append)
    assert len(said) == 1 and (copy / "ready.json").is_file()
    weights = start.load().state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.load().state_dict().items())


def test_a_benchmark_runs_from_it(start: Start, tmp_path: Path) -> None:
    config = replace(
        bench.QUICK, names=("sft", "target_sft"), steps=2, workers=1, start=start, learning_rates=start.rates((1e-3,))
    )
    results = bench.run_noise(config, tmp_path / "noise.json", resume=False, progress=lambda *_: None)
    assert results["config"]["start"]["folder"] == start.folder
    base = Start(str(tmp_path / "noise.bases" / "embedded-most")).load()
    assert base.config.vocab_size == start.load().config.vocab_size  # not the embedded model
    with pytest.raises(ConfigError, match=r"start was .* is .*; choose another --output"):
        bench.run_noise(replace(config, start=Start()), tmp_path / "noise.json", resume=True, progress=lambda *_: None)
    for name in ("noise.json", "noise.runs.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"noise\.bases was made with another start; delete it"):
        bench.run_noise(replace(config, start=Start()), tmp_path / "noise.json", resume=False, progress=lambda *_: None)


def test_results_that_name_no_start_are_of_the_embedded_base(tmp_path: Path) -> None:
    output = tmp_path / "old.json"
    output.write_text(json.dumps({"config": {"steps": 40}}))
    check_settings(output, True, {"steps": 40, "start": asdict(Start())})
    check_settings(output, False, {"steps": 41})
    with pytest.raises(ConfigError, match="start was"):
        check_settings(output, True, {"steps": 40, "start": asdict(Start("other"))})
    with pytest.raises(ConfigError, match="steps was 40, is 41"):
        check_settings(output, True, {"steps": 41})


def test_skill_documents_show_no_instruction_and_no_test_problem() -> None:
    texts = skill_texts(2000)
    assert not any("Instruction:" in text or "Response:" in text for text in texts)
    assert texts[:300] == skill_texts(300)
    asked = {row["prompt"] for row in load_demonstrations("heldout_skills_test")}  # in the base's own format
    beginnings = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    assert asked and not asked & beginnings
    problems = (tasks.sample_problem_in(skill, "train", Random(i)) for skill in tasks.SKILLS for i in range(300))
    assert {tasks.pretraining_text(problem, Random(0)) for problem in problems} & set(texts)  # those may be there


def test_a_corpus_is_cut_at_blank_lines(tmp_path: Path) -> None:
    for content in (b"one\nline\n\n\n two \n\n", b"one\nline\r\n\r\n two"):
        (tmp_path / "own.txt").write_bytes(content)
        assert list(real_texts(None, tmp_path / "own.txt")) == ["one\nline", "two"]
    (tmp_path / "own.txt").write_text("one\nline")
    with pytest.raises(DataError, match="has 1 paragraphs; a blank line ends one"):
        list(real_texts(None, tmp_path / "own.txt"))
    with pytest.raises(DataError, match="is missing"):
        list(real_texts(None, tmp_path / "none.txt"))
    with pytest.raises(DataError, match="--corpus, or their folder with --data"):
        list(real_texts(None, None))


def test_real_texts_are_whole_paragraphs() -> None:
    data = SHARED
    if not data.is_dir():
        pytest.skip("the real data is not part of the project")
    texts = list(real_texts(data, None))
    assert len(texts) > 5000
    assert all(text.strip() for text in texts)


def test_impossible_scales_are_refused_with_the_way_out(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device; leave --scale out"):
        start_of("gpu", tmp_path, None, tmp_path)
    with pytest.raises(ConfigError, match="expected cpu or gpu"):
        start_of("tpu", None, None, tmp_path)
    for data, corpus in ((None, tmp_path / "own.txt"), (tmp_path, None)):
        with pytest.raises(ConfigError, match="add --scale gpu"):
            start_of("cpu", data, corpus, tmp_path)
    for command in ("noise", "distill", "prior"):
        found = CliRunner().invoke(app, [command, "--scale", "gpu", "--output", str(tmp_path / "out.json")])
        assert found.exit_code != 0
        assert "CUDA" in str(found.exception or found.output)


def test_a_smoke_test_trains_its_base_for_a_minute(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own.txt").write_text("one\n\ntwo")
    for name, value in (("is_available", True), ("device_count", 1), ("is_bf16_supported", True)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    asked = []
    monkeypatch.setattr(start_module, "trained_start", lambda scale, *rest: asked.append(scale) or Start())
    for is_quick in (False, True):
        start_of("gpu", None, tmp_path / "own.txt", tmp_path, is_quick=is_quick)
    assert asked[0] == Scale()
    assert asked[1] == replace(Scale(), steps=asked[1].steps, skill_documents=asked[1].skill_documents)
    assert asked[1].steps < Scale().steps / 10
