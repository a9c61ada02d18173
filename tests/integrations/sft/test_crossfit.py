"""Rows judged by copies that have not seen them: against copies trained by hand with TRL, killed at every stage, and used."""

from __future__ import annotations

import gc
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

from qtarget import QTargetConfig
from qtarget.core.errors import CacheMismatchError, ConfigError, DataError
from qtarget.integrations.sft.crossfit import CrossfitRecipe, copies, crossfit_score, jobs, score
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import Manifest, fingerprint_model, row_checksum
from qtarget.scoring.contradictions import COPIES
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

ROWS = Dataset.from_list([*make_rows(14), make_rows(14)[3], {"prompt": make_rows(14)[3]["prompt"], "completion": "zz"}])
"""One row twice, and one prompt with two answers."""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def judge(tmp_path, base):
    def run(rows=ROWS, evals=None, folder="witness", top_k=0, shard_rows=4, settings=None, **recipe):
        args = QTargetConfig(str(tmp_path / "unused"), **{**SETTINGS, **(settings or {})})
        chosen = CrossfitRecipe(**{"steps": 4, "learning_rate": 1e-2, **recipe})
        return crossfit_score(
            base, args, rows, evals, make_tokenizer(), directory=tmp_path / folder, recipe=chosen, top_k=top_k,
            progress=False, shard_rows=shard_rows,
        )  # fmt: skip

    return run


def tokens_of(row) -> tuple[list[int], int]:
    tokenizer = make_tokenizer()
    prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["completion"] + "^"))
    return prompt + answer, len(prompt)


def numbers_of(path, row) -> np.ndarray:
    ids, start = tokens_of(row)
    cache = ReferenceCache.open(path)
    (index,) = cache.locate([row_checksum(ids, [i >= start for i in range(len(ids))])])
    return cache.row(index)["label_log_probs"]


def by_hand(base: str, tmp_path, learnt: list[dict], rank: int):
    """A copy trained by TRL's own trainer on some rows, merged."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(str(tmp_path / "by-hand"), **{**SETTINGS, "max_steps": 4, "learning_rate": 1e-2})
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        base,
        args,
        train_dataset=Dataset.from_list(learnt),
        processing_class=make_tokenizer(),
        peft_config=lora if rank else None,
    )
    trainer.train()
    return (trainer.model.merge_and_unload() if rank else trainer.model).eval()


@pytest.mark.parametrize("rank", [4, 0])
def test_each_row_is_judged_by_a_copy_trained_on_the_others(judge, base, tmp_path, rank):
    evals = Dataset.from_list([dict(ROWS[0]), {"prompt": "new:", "completion": "ab"}])
    manifest = judge(evals=evals, rank=rank)
    assert manifest.rows == 16  # 15 distinct training rows, and one evaluation row more
    told = manifest.crossfit
    assert told["folds"] == 2 and sum(told["rows"]) == 16 and len(set(told["copies"])) == 2
    assert (told["recipe"]["rank"], told["recipe"]["steps"], told["recipe"]["batch_size"]) == (rank, 4, 4)
    assert told["base_fingerprint"] == fingerprint_model(make_model())
    assert Manifest.read(tmp_path / "witness") == manifest
    # who judged whom is found by what the numbers are: each row fits one of two copies, those trained without its prompt
    rows = [dict(row) for row in ROWS]
    folds = folds_by_hand([*rows, *(dict(row) for row in evals)])
    for fold in (0, 1):
        learnt = [row for row, other in zip(rows, folds, strict=False) if other != fold]
        copy = by_hand(base, tmp_path, learnt, rank)
        judged = [row for row, other in zip([*rows, *map(dict, evals)], folds, strict=True) if other == fold]
        assert learnt and judged and not {row["prompt"] for row in learnt} & {row["prompt"] for row in judged}
        for row in judged:
            ids, start = tokens_of(row)
            with torch.no_grad():
                expected = copy(torch.tensor([ids])).logits[0].log_softmax(-1)
            at = [expected[t - 1, ids[t]].item() for t in range(start, len(ids))]
            np.testing.assert_allclose(numbers_of(tmp_path / "witness", row), at, rtol=2e-3, atol=2e-4)
    assert not (tmp_path / "witness" / COPIES).exists()


def folds_by_hand(rows) -> list[int]:
    """Who is dealt where, of the module that deals (tested by itself)."""
    from qtarget.data.crossfit.folds import assign_folds, prompt_key

    keys = []
    for row in rows:
        ids, start = tokens_of(row)
        keys.append(prompt_key(ids, [i >= start for i in range(len(ids))]))
    return assign_folds(keys, 2, SETTINGS["seed"]).tolist()


class Killed(BaseException):
    """A signal."""


def counting(monkeypatch, name: str, killed_at: int = -1) -> list[int]:
    calls, real = [], getattr(jobs, name)

    def spied(*args, **kwargs):
        if len(calls) == killed_at:
            raise Killed
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(jobs, name, spied)
    return calls


def test_a_trained_copy_is_never_trained_again_and_the_bytes_are_those_of_an_undisturbed_run(
    judge, tmp_path, monkeypatch
):
    judge(folder="undisturbed")
    with monkeypatch.context() as patch:
        counting(patch, "train_copy", killed_at=1)
        with pytest.raises(Killed):
            judge()
    assert (tmp_path / "witness" / COPIES / "fold-0").is_dir() and not (tmp_path / "witness/plan.json").exists()
    with monkeypatch.context() as patch:  # now killed while it scores its second shard
        trained, scored = counting(patch, "train_copy"), []
        real = score.LocalSource.score

        def scoring(self, *args, **kwargs):
            if len(scored) == 1:
                raise Killed
            scored.append(1)
            return real(self, *args, **kwargs)

        patch.setattr(score.LocalSource, "score", scoring)
        with pytest.raises(Killed):
            judge()
        assert len(trained) == 1  # the second copy alone
    first = (tmp_path / "witness/shard-00000.parquet").stat().st_mtime_ns
    trained = counting(monkeypatch, "train_copy")
    judge()
    assert not trained
    assert (tmp_path / "witness/shard-00000.parquet").stat().st_mtime_ns == first
    names = sorted(path.name for path in (tmp_path / "undisturbed").glob("*.parquet"))
    for name in (*names, "manifest.json", "plan.json"):
        assert (tmp_path / "witness" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    judge()  # finished: nothing is trained or scored
    assert not trained


def models_alive() -> int:
    return sum(isinstance(found, LlamaForCausalLM) for found in gc.get_objects())


@pytest.mark.parametrize("rank", [4, 0])
def test_one_model_is_in_memory_at_a_time(judge, monkeypatch, rank):
    gc.collect()
    before, seen = models_alive(), []

    def watched(real):
        def call(*args, **kwargs):
            seen.append(models_alive() - before)  # what is there when the next one is about to be loaded
            return real(*args, **kwargs)

        return call

    for name in ("train_copy", "load_model"):
        monkeypatch.setattr(jobs, name, watched(getattr(jobs, name)))
    judge(rank=rank)
    assert len(seen) >= 6 and set(seen) == {0}


def test_a_damaged_shard_is_judged_again_by_the_same_copy(judge, tmp_path, monkeypatch):
    judge()
    shard = tmp_path / "witness/shard-00001.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    judge()
    assert shard.read_bytes() == whole
    shard.unlink()  # and a copy that comes out otherwise, as on a device whose sums differ from run to run, may not
    monkeypatch.setattr(copies.Copies, "ready", lambda self, fold: "another")
    with pytest.raises(CacheMismatchError, match="was trained again and has the fingerprint another"):
        judge()


def test_another_recipe_other_rows_or_an_ordinary_cache_are_refused(judge, tmp_path, cached, monkeypatch):
    counting(monkeypatch, "train_copy", killed_at=1)
    with pytest.raises(Killed):
        judge()
    with pytest.raises(CacheMismatchError, match=r"another cross-fit: .*rate.*0.5"):
        judge(learning_rate=0.5)
    with pytest.raises(CacheMismatchError, match=r"another cross-fit: .*split"):
        judge(rows=ROWS.select(range(12)))
    with pytest.raises(CacheMismatchError, match=r"another cross-fit: folds was 2 and is 3;"):
        judge(folds=3)
    cached()
    with pytest.raises(CacheMismatchError, match=r"no cross-fit's|another cross-fit"):
        judge(folder="cache")


@pytest.mark.parametrize(
    ("settings", "recipe", "error", "words"),
    [
        ({"prompt_weight": 0.1}, {}, ConfigError, "prompt_weight trains prompts too"),
        ({}, {"folds": 20}, DataError, "different prompts for 20 folds"),
        ({}, {"learning_rate": math.nan}, ConfigError, "positive rate"),
        ({}, {"folds": 1}, ConfigError, "at least 2 folds"),
    ],
)
def test_what_cannot_be_is_refused(judge, settings, recipe, error, words):
    with pytest.raises(error, match=words):
        judge(settings=settings, **recipe)


def test_any_target_takes_it_as_reference_or_teacher_of_the_same_base_alone(judge, make_trainer, tmp_path):
    judge(top_k=8)
    path = str(tmp_path / "witness")
    for target, role in (("prior_surprise", "reference"), ("asft", "reference"), ("target_sft", "teacher")):
        trainer = make_trainer(target, data=ROWS, **{f"{role}_cache": path})
        trainer.train()
        assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    with pytest.raises(CacheMismatchError, match="model_fingerprint"):
        make_trainer("asft", model=make_model(seed=5), data=ROWS, reference_cache=path)


def test_a_manifest_that_contradicts_itself_is_refused(judge, tmp_path):
    judge()
    path = tmp_path / "witness/manifest.json"
    sound = json.loads(path.read_text())
    changes = (
        ("folds", {"folds": 1}),
        ("copies", {"copies": ["a"]}),
        ("rows", {"rows": [1, "2"]}),
        ("keys", {"extra": 1}),
    )
    for words, change in (*changes, ("seed", {"seed": "7"})):
        path.write_text(json.dumps(sound | {"crossfit": sound["crossfit"] | change}))
        with pytest.raises(CacheMismatchError, match=words):
            ReferenceCache.open(tmp_path / "witness")
    path.write_text(json.dumps(sound))
    ReferenceCache.open(tmp_path / "witness")


def test_each_answer_is_asked_under_other_prompts_of_its_fold(judge, base, tmp_path):
    from qtarget.scoring.contradictions import SIDE, read_side

    judge(rank=0)
    rows = [dict(row) for row in ROWS]
    tokens = [tokens_of(row) for row in rows]
    names = [row_checksum(ids, [i >= start for i in range(len(ids))]) for ids, start in tokens]
    found = read_side(tmp_path / "witness", names)
    assert found is not None
    assert found[3] == found[14]  # one row twice
    # the copy of a fold, by hand: the rows that it has not learnt are those whose numbers it gives
    models = []
    for fold in range(2):
        learnt = [row for row in rows if not _of_fold(tmp_path, rows, row, fold)]
        models.append(by_hand(base, tmp_path, learnt, 0))
    for (ids, start), row, told in zip(tokens, rows, found.tolist(), strict=True):
        fold = next(n for n in range(2) if _of_fold(tmp_path, rows, row, n))
        others = {tuple(tokens_of(one)[0][: tokens_of(one)[1]]) for one in rows if _of_fold(tmp_path, rows, one, fold)}
        longest = max(len(one) for one, _ in tokens)
        prompts = [p for p in others - {tuple(ids[:start])} if len(p) + len(ids) - start <= longest]
        answer = ids[start:]
        likelier = [_said(models[fold], [*p, *answer], len(p)) - _said(models[fold], ids, start) for p in prompts]
        assert len(prompts) <= 7
        # six are asked: of seven the least alike is left out, which may be the best
        allowed = sorted(np.clip(likelier, -20, 20).tolist())[-max(1, len(prompts) - 5) :]
        assert any(told == pytest.approx(value, abs=1e-3) for value in allowed)
    (tmp_path / "witness" / SIDE).write_bytes(b"no archive")
    with pytest.raises(CacheMismatchError, match="cannot be read"):
        read_side(tmp_path / "witness", names)


def _of_fold(tmp_path, rows, row, fold: int) -> bool:
    from qtarget.data.crossfit.folds import assign_folds, prompt_key

    parts = [tokens_of(one) for one in rows]
    keys = [prompt_key(ids, [i >= start for i in range(len(ids))]) for ids, start in parts]
    return bool(assign_folds(keys, 2, SETTINGS.get("seed", 42))[rows.index(row)] == fold)


def _said(model, ids: list[int], start: int) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return float(sum(log_probs[i - 1, ids[i]] for i in range(start, len(ids))))


@pytest.mark.parametrize("change", ["weights", "weight_decay"])
def test_a_begun_folder_goes_on_with_no_other_base_and_no_other_setting(judge, tmp_path, base, monkeypatch, change):
    with monkeypatch.context() as patch:
        counting(patch, "train_copy", killed_at=1)
        with pytest.raises(Killed):
            judge(steps=1)
    settings = {"weight_decay": 0.1} if change == "weight_decay" else {}
    if change == "weights":
        changed = make_model()
        with torch.no_grad():
            changed.get_output_embeddings().weight[0, 0] += 0.5  # one number
        changed.save_pretrained(base)
    words = "recipe.settings.weight_decay was 0.0 and is 0.1" if settings else "base_fingerprint was "
    with pytest.raises(CacheMismatchError, match=words):
        judge(steps=1, settings=settings)


def test_what_a_run_says_of_its_evaluation_and_warm_up_does_not_break_copies(judge, tmp_path) -> None:
    from qtarget.integrations.sft.crossfit.recipe import copy_settings

    own = {"eval_on_start": True, "warmup_steps": 100, "eval_strategy": "steps", "eval_steps": 1}
    args = QTargetConfig(str(tmp_path / "unused"), **{**SETTINGS, **own})
    found = copy_settings(args, CrossfitRecipe(steps=40), 8, tmp_path / "copy")
    assert (found.max_steps, found.warmup_steps, found.eval_on_start) == (40, 4, False)
    assert judge(evals=ROWS.select(range(2)), settings=own, steps=1).crossfit is not None
