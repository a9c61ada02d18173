from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qtarget.core.errors import HyperparameterError, NonFiniteLossError, UnsupportedModelError
from qtarget.scoring.sources.local import LocalSource, evaluating, plan_batches, score_rows
from qtarget.scoring.sources.logits import spend_logits
from tests.scoring.helpers import VOCAB, ragged_rows, tiny_model
from tests.scoring.sources.source_suite import SourceSuite

FINGERPRINTS = {"model_id": "tiny", "tokenizer_fingerprint": "t", "chat_template_fingerprint": "c"}


@torch.no_grad()
def oracle(model, row, scale=1.0, softcap=None):
    """float64 log-softmax of one unpadded, unbatched forward: log-probs ``[tokens, vocab]`` and the labels there."""
    ids = torch.tensor(row["input_ids"])
    logits = model(input_ids=ids[None]).logits[0].double() * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    places = [t for t in range(1, len(ids)) if row["labels"][t] != -100]
    return logits.log_softmax(-1)[[t - 1 for t in places]].numpy(), ids[places].numpy()


def score(source, rows, top_k=0):
    """The supervised positions of training rows."""
    masks = [np.array(row["labels"][1:]) != -100 for row in rows]
    return source.score(
        [np.array(row["input_ids"]) for row in rows], top_k, positions=[np.flatnonzero(mask) + 1 for mask in masks]
    )


class TestLocal(SourceSuite):
    @pytest.fixture(scope="class")
    def source(self):
        return LocalSource(tiny_model(), tokens_per_batch=100)


class TestLocalRowByRow(SourceSuite):
    @pytest.fixture(scope="class")
    def source(self):
        return LocalSource(tiny_model(), tokens_per_batch=1)


@pytest.mark.parametrize("head", [{}, {"scale": 0.5}, {"scale": 2.0, "softcap": 3.0}])
@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10_000])
def test_numbers_are_those_of_an_unbatched_forward_in_float64(head, tokens_per_batch):
    model, rows = tiny_model(), ragged_rows(24)
    names = {"scale": "logit_scale", "softcap": "logit_softcap"}
    source = LocalSource(model, tokens_per_batch=tokens_per_batch, **{names[key]: value for key, value in head.items()})
    total = 0
    for row, scored in zip(rows, score(source, rows, 5), strict=True):
        log_probs, labels = oracle(model, row, **head)
        total += len(labels)
        rank = np.argsort(-log_probs, axis=-1)
        at_label = np.take_along_axis(log_probs, labels[:, None], -1)[:, 0]
        np.testing.assert_allclose(scored.label_log_probs, at_label, atol=1e-5)
        np.testing.assert_allclose(scored.entropy, -(np.exp(log_probs) * log_probs).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(scored.topk_ids, rank[:, :5])
        np.testing.assert_allclose(scored.topk_log_probs, np.take_along_axis(log_probs, rank[:, :5], -1), atol=1e-5)
        tail = np.log(np.exp(np.take_along_axis(log_probs, rank[:, 5:], -1)).sum(-1))
        np.testing.assert_allclose(scored.tail_log_mass, tail, atol=1e-5)
        assert scored.topk_ids.shape == (len(labels), 5)
    assert total > 150


def test_a_bfloat16_model_is_read_in_float32():
    model, row = tiny_model().to(torch.bfloat16), ragged_rows(1, seed=3)[0]
    (scored,) = score(LocalSource(model), [row])
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0].double()
        log_probs = (hidden @ model.lm_head.weight.double().T).log_softmax(-1).numpy()
    places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
    expected = [log_probs[t - 1, row["labels"][t]] for t in places]
    np.testing.assert_allclose(scored.label_log_probs, expected, atol=1e-5)


def test_top_k_of_the_whole_vocabulary_leaves_no_tail():
    (scored,) = score(LocalSource(tiny_model()), ragged_rows(1, seed=3), VOCAB)
    assert (np.exp(scored.tail_log_mass) == 0).all()
    np.testing.assert_allclose(np.exp(scored.topk_log_probs.astype(np.float64)).sum(-1), 1, atol=1e-5)


def test_scoring_twice_gives_the_same_bits():
    rows = ragged_rows(16)
    once, again = (score(LocalSource(tiny_model(), tokens_per_batch=200), rows, 3) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a.label_log_probs, b.label_log_probs)
        np.testing.assert_array_equal(a.topk_log_probs, b.topk_log_probs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 120))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    widest = [max(lengths[i] for i in batch) for batch in batches]
    assert widest == sorted(widest, reverse=True)


def test_every_module_returns_to_its_mode():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with contextlib.suppress(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_dropout_is_off_while_scoring_and_the_model_trains_on():
    rows = ragged_rows(4)
    quiet, noisy = tiny_model(attention_dropout=0.5), tiny_model(attention_dropout=0.5).train()
    for a, b in zip(score(LocalSource(quiet), rows), score(LocalSource(noisy), rows), strict=True):
        np.testing.assert_array_equal(a.label_log_probs, b.label_log_probs)
    assert noisy.training
    assert noisy.model.layers[0].training


def test_progress_counts_supervised_tokens():
    rows, seen = ragged_rows(9), []
    score(LocalSource(tiny_model(), tokens_per_batch=64, on_tokens=seen.append), rows)
    assert sum(seen) == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert len(seen) > 1


def test_what_cannot_be_scored_is_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(HyperparameterError, match="top_k=62; expected 0 to 61"):
        score_rows(model, ragged_rows(3), tmp_path / "wide", top_k=62, progress=False, **FINGERPRINTS)
    assert not (tmp_path / "wide").exists()
    with pytest.raises(HyperparameterError, match="tokens_per_batch=0"):
        LocalSource(model, tokens_per_batch=0)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match="NaN or infinite at position"):
        score_rows(model, ragged_rows(3), tmp_path, progress=False, **FINGERPRINTS)
    assert not list(tmp_path.glob("shard*"))
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        LocalSource(model)
    headless = tiny_model()
    headless.lm_head = None
    with pytest.raises(UnsupportedModelError, match="no floating-point output embeddings"):
        LocalSource(headless)


@pytest.mark.parametrize("top_k", [0, 3, VOCAB])
def test_spent_logits_give_the_statistics_of_kept_ones(top_k):
    """Also where tokens are banned; the oracle is float64 and keeps every intermediate."""
    logits = 5 * torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[2, 5:50] = -torch.inf
    labels, columns = torch.tensor([3, 1, 2, 60, 4, 0, 9]), torch.tensor([60, 1, 7])
    log_probs = logits.double().log_softmax(-1).numpy()
    with np.errstate(invalid="ignore"):
        entropy = -np.nan_to_num(np.exp(log_probs) * log_probs).sum(-1)
    found = {name: value.numpy() for name, value in spend_logits(logits.clone(), labels, top_k, columns).items()}
    np.testing.assert_allclose(found["label_log_probs"], log_probs[np.arange(7), labels], atol=1e-5)
    np.testing.assert_allclose(found["entropy"], entropy, atol=1e-5)
    np.testing.assert_allclose(found["candidate_log_probs"], log_probs[:, columns], atol=1e-5)
    assert len(found) == (6 if top_k else 3)
    if top_k:
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        rest = np.exp(np.take_along_axis(log_probs, order[:, top_k:], -1)).sum(-1)
        largest = np.take_along_axis(log_probs, order[:, :top_k], -1)
        np.testing.assert_allclose(found["topk_log_probs"], largest, atol=1e-5)
        np.testing.assert_allclose(np.exp(found["tail_log_mass"]), rest, rtol=1e-4, atol=1e-30)
    banned = spend_logits(logits[2:3].clone(), torch.tensor([7]), 0, None)
    assert banned["label_log_probs"].item() == -np.inf  # and is refused when it is stored
