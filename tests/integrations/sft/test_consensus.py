"""What rows say of one another on its way to the loss: counted once, beside the cache, and aligned padded and packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

import qtarget
from qtarget.core.errors import IncompatibleError, MissingStatisticError
from qtarget.data.agreement import agreement, confident_choices, context_trust, prior_conflict, prior_reliability
from tests.integrations.conftest import make_model, make_tokenizer

NOISY = 5
"""The row whose answer has one letter that no other row has in that place."""


def formatted_rows(count: int = 16) -> Dataset:
    """Random prompts, completions of one format: ``is <first letter> ok``; row 5 ends in ``oZ``."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        word = "".join(rng.choice([*"abcdefgh"], size=rng.integers(2, 6)))
        rows.append({"prompt": f"{word}:", "completion": f"is {word[0]} o" + ("Z" if i == NOISY else "k")})
    return Dataset.from_list(rows)


def tokens_of(rows: Dataset) -> tuple[list[list[int]], list[list[bool]]]:
    tokenizer = make_tokenizer()
    ids, masks = [], []
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["completion"] + "^"))
        ids.append(prompt + answer)
        masks.append([False] * len(prompt) + [True] * len(answer))
    return ids, masks


@torch.no_grad()
def sure_base():
    """A model that has a favourite nearly everywhere."""
    base = make_model(seed=3)
    base.lm_head.weight *= 5
    return base


@torch.no_grad()
def expected_loss(target: qtarget.Target, base, rows_seen: set[int]) -> float:
    """Each row alone, full logits, and the rows' numbers counted over the whole data set."""
    ids, masks = tokens_of(formatted_rows())
    places = [[i - 1 for i, kept in enumerate(mask) if kept] for mask in masks]
    known = []
    for row, at in zip(ids, places, strict=True):
        logits = base.eval()(torch.tensor([row])).logits[0, at]
        known.append(qtarget.Reference.from_logits(logits, torch.tensor(row)[torch.tensor(at) + 1]))
    log_probs = [k.label_log_probs.numpy() for k in known]
    agreed = agreement(ids, masks)
    said = [confident_choices(*(v.numpy() for v in reversed(k.log_probs.topk(1)))) for k in known]
    trust = [context_trust(values) for values in agreed]
    conflict = prior_conflict(ids, masks, log_probs, said, trust)
    by_context = prior_conflict(ids, masks, log_probs, None, trust)
    assert any((c != d).any() for c, d in zip(conflict, by_context, strict=True)), "the case is too weak to tell"
    rho = prior_reliability(np.concatenate(agreed), np.concatenate(log_probs), np.concatenate(trust))
    assert 0.001 < rho < 0.9 and max(c.max() for c in conflict) > 0.5, "the case is too weak to tell"
    total, count = 0.0, 0
    for index in rows_seen:
        at = torch.tensor(places[index])
        row = torch.tensor(ids[index])
        counted = {"agreement": torch.from_numpy(agreed[index]), "conflict": torch.from_numpy(conflict[index])}
        reference = qtarget.Reference(
            label_log_probs=known[index].label_log_probs,
            log_probs=known[index].log_probs,
            reliability=torch.from_numpy(rho * (1 - conflict[index])),
            **counted,
        )
        logits = make_model().eval()(row[None]).logits[0, at]
        roles = {"reference": reference, "teacher": reference if target.needs.teacher else None}
        total += float(qtarget.target_loss(logits, row[at + 1], target, reduction="sum", **roles))
        count += len(at)
    return total / count


CASES = [("consensus", False, "reference"), ("asft", True, "reference"), ("target_sft", True, "teacher")]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("target", "guard", "role"), CASES)
def test_the_loss_from_a_cache_is_that_of_full_logits(make_trainer, cached, target, guard, role, packing):
    base = sure_base()
    named = {f"{role}_cache": cached(base, formatted_rows(), model_id="base"), f"{role}_model_name_or_path": "base"}
    kwargs = {"target_kwargs": {"kl_weight": 0.7}} if target == "asft" else {}
    trainer = make_trainer(target, data=formatted_rows(), guard=guard, packing=packing, **named, **kwargs)
    assert trainer.frozen_models == {}
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    rows_seen = {int(i) for i in batch["row_ids"].unique()} - {-1}
    built = qtarget.get_target(target, **kwargs.get("target_kwargs", {}))
    expected = expected_loss(qtarget.Guarded(built) if guard else built, base, rows_seen)
    assert loss == pytest.approx(expected, rel=1e-4)
    if guard:
        assert trainer.target.name == f"guarded {target}"
        assert abs(expected_loss(built, base, rows_seen) - expected) > 1e-3  # the guard is felt here


@pytest.mark.parametrize(("target", "guard"), [("consensus", False), ("asft", True)])
def test_padded_and_packed_train_alike(make_trainer, cached, target, guard):
    path = cached(make_model(seed=3), formatted_rows(), model_id="base")
    named = {"reference_cache": path, "reference_model_name_or_path": "base"}
    runs = []
    for settings in ({"per_device_train_batch_size": 16}, {"packing": True, "max_length": 256}):
        trainer = make_trainer(target, data=formatted_rows(), guard=guard, max_steps=2, **named, **settings)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(runs[0]) == 2
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert runs[0][1] < runs[0][0]


@pytest.mark.parametrize(("target", "guard", "role"), CASES)
def test_a_live_model_is_refused_with_the_way_out(make_trainer, target, guard, role):
    words = rf"{target}' weighs what the rows agree on against the frozen {role}.*`qtarget score CONFIG.yaml.*set {role}: CACHE"
    with pytest.raises(MissingStatisticError, match=words):
        make_trainer(target, guard=guard, models={f"{role}_model": make_model(seed=3)})
    with pytest.raises(MissingStatisticError, match=words):
        make_trainer(target, guard=guard, **{f"{role}_model_name_or_path": "some/model"})


@pytest.mark.parametrize(("target", "words"), [("talr", "weighs a whole batch"), ("distillation", "never looks")])
def test_what_cannot_be_guarded_is_refused(make_trainer, target, words):
    with pytest.raises(IncompatibleError, match=words):
        make_trainer(target, guard=True)


def test_a_random_token_has_less_agreement_than_the_clean_ones_in_its_place(make_trainer, cached):
    trainer = make_trainer("consensus", data=formatted_rows(), reference_cache=cached(data=formatted_rows()))
    tokenizer = make_tokenizer()
    at_last = {
        row["qtarget_row_ids"][0]: (tokenizer.decode(row["input_ids"][-2]), row["reference_agreement"][-2])
        for row in trainer.train_dataset
    }
    assert at_last[NOISY] == ("Z", 0.0)
    assert all(letter == "k" and share > 0.8 for i, (letter, share) in at_last.items() if i != NOISY)
    for row in trainer.train_dataset:
        prompt = [share for share, label in zip(row["reference_agreement"], row["labels"]) if label == -100]
        assert prompt and not any(prompt)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_columns_are_those_of_the_truncated_rows(make_trainer, cached, mode):
    settings = {"max_length": 9, "truncation_mode": mode}
    path = cached(data=formatted_rows(), **settings)
    trainer = make_trainer("consensus", data=formatted_rows(), guard=True, reference_cache=path, **settings)
    rows = list(trainer.train_dataset)
    assert max(len(ids) for ids in tokens_of(formatted_rows())[0]) > 9 == max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] for row in rows]
    masks = [[i > 0 and label != -100 for i, label in enumerate(row["labels"])] for row in rows]
    for row, mask, expected in zip(rows, masks, agreement(ids, masks), strict=True):
        for name in ("agreement", "reliability", "conflict"):
            assert len(row[f"reference_{name}"]) == len(row["input_ids"])
        np.testing.assert_allclose(np.array(row["reference_agreement"])[np.array(mask)], expected, rtol=1e-6)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_evaluation_rows_are_counted_among_themselves(make_trainer, cached):
    evals = formatted_rows().select([0, NOISY])
    path = cached(data=formatted_rows(), evals=evals)
    trainer = make_trainer("consensus", data=formatted_rows(), evals=evals, reference_cache=path)
    ids, masks = tokens_of(evals)
    for row, mask, expected in zip(trainer.eval_dataset, masks, agreement(ids, masks), strict=True):
        np.testing.assert_allclose(np.array(row["reference_agreement"])[np.array(mask)], expected, rtol=1e-6)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
