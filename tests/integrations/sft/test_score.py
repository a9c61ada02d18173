"""Scored once or run live: the same loss, padded and packed; and a cache that does not fit is refused."""

import pytest
import torch
from datasets import Dataset

from qtarget.core.errors import CacheMismatchError, ConfigError, MissingStatisticError
from tests.integrations.conftest import make_model, make_rows, make_tokenizer


def first_loss(trainer) -> float:
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(next(iter(trainer.get_train_dataloader())))))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("target", ["prior_surprise", "asft", "sft_kl", "gift", "iw_sft", "rho1"])
def test_cache_gives_the_loss_of_a_live_model(make_trainer, cached, target, packing):
    """top_k is the whole vocabulary, so that nothing but the route differs; log-probs are stored in full precision."""
    live = make_trainer(target, models={"reference_model": make_model(seed=3)}, packing=packing)
    path = cached(make_model(seed=3), model_id="another base")
    stored = make_trainer(target, reference_cache=path, reference_model_name_or_path="another base", packing=packing)
    for trainer in (live, stored):
        trainer.train()
    assert stored.frozen_models == {}  # no second model in memory
    a, b = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in (live, stored))
    assert len(a) == 3
    assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("target", ["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "taid"])
def test_student_equal_to_teacher_has_no_divergence(make_trainer, cached, target, packing):
    """The off-by-one of teacher and labels, through the real collator: any shift makes this large."""
    trainer = make_trainer(target, teacher_cache=cached(top_k=16), packing=packing)
    assert abs(first_loss(trainer)) < 1e-6
    other = make_trainer(target, model=make_model(seed=2), teacher_cache=cached(top_k=16), packing=packing)
    assert first_loss(other) > 1e-3


def test_evaluation_rows_are_scored_too(make_trainer, cached):
    evals = make_rows(5, seed=11)
    path = cached(evals=evals)
    with_cache = make_trainer("asft", reference_cache=path, evals=evals).evaluate()["eval_loss"]
    live = make_trainer("asft", models={"reference_model": make_model()}, evals=evals).evaluate()["eval_loss"]
    assert with_cache == pytest.approx(live, rel=1e-5)


def test_a_cache_of_labels_alone_cannot_anchor(make_trainer, cached):
    path = cached(top_k=0)
    make_trainer("prior_surprise", reference_cache=path)
    with pytest.raises(MissingStatisticError, match="--top_k"):
        make_trainer("asft", reference_cache=path)


def edited_rows() -> Dataset:
    rows = make_rows().to_list()
    rows[3]["completion"] += "z"
    return Dataset.from_list(rows)


def test_an_edited_row_is_named(make_trainer, cached):
    path = cached()
    with pytest.raises(CacheMismatchError, match=r"rows 4;.*qtarget score"):
        make_trainer("asft", data=edited_rows(), reference_cache=path)


def test_another_model_is_refused(make_trainer, cached):
    path = cached(make_model(seed=1))
    with pytest.raises(CacheMismatchError, match="model"):
        make_trainer("asft", reference_cache=path)
    with pytest.raises(CacheMismatchError, match="'meant'"):
        make_trainer("asft", reference_cache=path, reference_model_name_or_path="meant")


def test_another_tokenizer_is_refused(make_trainer, cached):
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    path = cached(tokenizer=other)
    with pytest.raises(CacheMismatchError, match="tokenizer"):
        make_trainer("asft", reference_cache=path)


def test_packing_that_cuts_rows_is_refused(make_trainer, cached):
    path = cached()
    with pytest.raises(ConfigError, match="bfd"):
        make_trainer("asft", reference_cache=path, packing=True, packing_strategy="wrapped")
