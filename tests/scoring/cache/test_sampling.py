"""Random-sampling distillation: the same draws whatever happens, unbiased where that is claimed, refused elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qtarget
from qtarget.core.errors import HyperparameterError, IncompatibleError
from qtarget.core.types import Reference
from qtarget.integrations.sft.data.collator import cached_columns
from qtarget.integrations.shared.step import REFERENCE_FIELDS
from qtarget.scoring.cache.columns import compact, expand
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.writer import uniforms, write_cache
from qtarget.scoring.sources.local import LocalSource, inverse_cumulative
from tests.scoring.helpers import VOCAB, HashSource, contents, provenance, ragged_rows, tiny_model

DRAWS = 50


def sampled(**changes):
    return provenance(sampled=DRAWS, tail_policy="sampled", **changes)


def test_draws_are_those_of_the_distribution(tmp_path):
    """Frequencies over many seeds against the float64 softmax of the plain model."""
    rows, model = [{"input_ids": [5, 7, 9], "labels": [-100, 7, 9]}], tiny_model()
    with torch.no_grad():
        expected = model(torch.tensor([rows[0]["input_ids"]])).logits[0, :2].double().softmax(-1).numpy()
    seen = np.zeros((2, VOCAB))
    for seed in range(40):
        write_cache(tmp_path / f"{seed}", rows, LocalSource(model), sampled(seed=seed))
        row = ReferenceCache.open(tmp_path / f"{seed}").row(0)
        assert row.keys() == {"label_log_probs", "entropy", "topk_ids", "topk_log_probs"}
        for t in range(2):
            used = row["topk_ids"][t] >= 0
            shares = np.exp(row["topk_log_probs"][t][used].astype(np.float64))
            np.testing.assert_allclose(shares.sum(), 1, atol=1e-6)
            np.testing.assert_allclose(shares * DRAWS, np.round(shares * DRAWS), atol=1e-4)
            seen[t, row["topk_ids"][t][used]] += shares
    n = 40 * DRAWS
    assert (np.abs(seen / 40 - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1 / n).all()


def test_the_same_bytes_whatever_lies_beside_and_another_seed_differs(tmp_path):
    rows = ragged_rows(9)
    source = LocalSource(tiny_model(), tokens_per_batch=64)
    write_cache(tmp_path / "a", rows, source, sampled(), shard_rows=3)
    write_cache(tmp_path / "b", rows, source, sampled(), shard_rows=3)
    (tmp_path / "b" / "shard-00001.parquet").unlink()
    (tmp_path / "b" / "manifest.json").unlink()
    write_cache(tmp_path / "b", rows, source, sampled(), shard_rows=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    write_cache(tmp_path / "c", rows, source, sampled(seed=1), shard_rows=3)
    assert contents(tmp_path / "a")["shard-00000.parquet"] != contents(tmp_path / "c")["shard-00000.parquet"]
    a, b = uniforms("00", 0, 4, 3), uniforms("00", 0, 4, 3)
    np.testing.assert_array_equal(a, b)
    assert not (a == uniforms("01", 0, 4, 3)).any()


def test_counting_and_expanding_against_numpy():
    draws = np.random.default_rng(0).integers(0, 9, (40, DRAWS)).astype(np.int32)
    draws[3] = 8
    found = compact(draws)
    row = expand(found.sizes, found.ids, found.counts)
    for t in range(40):
        ids, counts = np.unique(draws[t], return_counts=True)
        used = row["topk_ids"][t] >= 0
        np.testing.assert_array_equal(row["topk_ids"][t][used], ids)
        np.testing.assert_allclose(row["topk_log_probs"][t][used], np.log(counts / DRAWS), rtol=1e-6)
        assert (row["topk_log_probs"][t][~used] == -np.inf).all()


def test_inverse_cumulative_by_hand():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()
    ids = inverse_cumulative(logits, torch.tensor([[0.0, 0.49, 0.51, 0.74, 0.76, 0.999999]], dtype=torch.float64))
    assert ids.tolist() == [[0, 0, 2, 2, 3, 3]]


def reference_of(tmp_path, seed, rows, model):
    path = tmp_path / f"{seed}"
    write_cache(path, rows, LocalSource(model), sampled(seed=seed))
    labels = torch.tensor([rows[0]["labels"]])
    columns = cached_columns(ReferenceCache.open(path), [(0, 0, len(rows[0]["labels"]), 0)], labels, "teacher", True)
    values = {name: columns.get(f"teacher_{name}") for name in REFERENCE_FIELDS}
    return Reference(**values, tail_policy="sampled").map_tensors(lambda _, value: value[:, 1:])


@pytest.mark.parametrize("target", ["distillation", "hybrid_distillation", "forward_kl"])
def test_the_gradient_is_unbiased_where_the_target_is_linear(tmp_path, target):
    rows, model = [{"input_ids": [5, 7, 9, 3], "labels": [-100, 7, 9, 3]}], tiny_model()
    labels = torch.tensor([[7, 9, 3]])
    torch.manual_seed(0)
    student = torch.randn(1, 3, VOCAB)

    def gradient(teacher):
        logits = student.clone().requires_grad_(True)
        qtarget.target_loss(logits, labels, target, teacher=teacher).backward()
        return logits.grad

    with torch.no_grad():
        full = Reference(log_probs=model(torch.tensor([rows[0]["input_ids"]])).logits[:, :-1].log_softmax(-1))
    expected = gradient(full)
    found = torch.stack([gradient(reference_of(tmp_path, seed, rows, model)) for seed in range(60)])
    error = found.std(0) / 60**0.5
    assert ((found.mean(0) - expected).abs() < 5 * error + 1e-3).all()
    assert (found[0] - expected).norm() > 2 * (found.mean(0) - expected).norm()  # one draw is far off, the mean is not


@pytest.mark.parametrize("target", ["target_sft", "taid", "reverse_kl", "generalized_jsd", "skew_kl"])
def test_targets_that_draws_would_bias_are_refused_by_name(tmp_path, target):
    rows = [{"input_ids": [5, 7, 9, 3], "labels": [-100, 7, 9, 3]}]
    teacher = reference_of(tmp_path, 0, rows, tiny_model())
    hidden, head = torch.zeros(1, 3, 4), torch.zeros(VOCAB, 4)
    with pytest.raises(IncompatibleError, match=f"target '{target}' is not linear in the teacher.*--top_k 32"):
        qtarget.target_loss(torch.zeros(1, 3, VOCAB), torch.tensor([[7, 9, 3]]), target, teacher=teacher)
    with pytest.raises(IncompatibleError, match="not linear"):
        qtarget.linear_target_loss(hidden, head, torch.tensor([[7, 9, 3]]), target, teacher=teacher)


def test_what_cannot_be_sampled_says_so(tmp_path):
    rows = ragged_rows(3)
    with pytest.raises(IncompatibleError, match="HashSource tells its largest log-probs only"):
        write_cache(tmp_path / "a", rows, HashSource(), sampled())
    with pytest.raises(IncompatibleError, match="a cache holds one of them"):
        write_cache(tmp_path / "a", rows, LocalSource(tiny_model()), sampled(top_k=3))
    with pytest.raises(HyperparameterError, match="sampled=256"):
        write_cache(tmp_path / "a", rows, LocalSource(tiny_model()), provenance(sampled=256))
    assert not (tmp_path / "a").exists()
