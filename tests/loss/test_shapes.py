"""Large and degenerate shapes of the chunked loss against the dense oracle."""

from __future__ import annotations

import math

import pytest
import torch

import qtarget

METHODS = ("sft", "label_smoothing", "eaft", "asft", "target_sft", "reverse_kl", "generalized_jsd")


def both(name: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, known, **kwargs):
    """Summed loss and gradients: chunked, by the float64 oracle, and dense in the chunked one's dtype."""
    target = qtarget.get_target(name)
    roles = [role for role in ("reference", "teacher") if getattr(target.needs, role)]
    out = []
    for backend, dtype in (("chunked", hidden.dtype), ("dense", torch.float64), ("dense", hidden.dtype)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        frozen = known.map_tensors(lambda _, v, d=dtype: v.to(d) if v.is_floating_point() else v)
        loss = qtarget.linear_target_loss(
            *leaves,
            labels,
            target,
            backend=backend,
            reduction="sum",
            **dict.fromkeys(roles, frozen),
            **kwargs,
        )
        out.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    return out


def drawn(tokens: int, vocab: int, dtype: torch.dtype, k: int, scale: float = 1.0, seed: int = 0):
    """Logits of standard deviation ``2 scale``; below a width of 16, MKL itself sums 152,064 numbers to 1e-4 only."""
    rng = torch.Generator().manual_seed(tokens + seed)
    hidden = scale * torch.randn(tokens, 16, generator=rng, dtype=dtype)
    weight = torch.randn(vocab, 16, generator=rng, dtype=dtype) / 2
    labels = torch.randint(vocab, (tokens,), generator=rng)
    other = hidden + 0.3 * torch.randn(hidden.shape, generator=rng, dtype=dtype)
    known = qtarget.token_statistics(hidden=other, lm_head_weight=weight, labels=labels, top_k=k, chunk_size=512)
    return hidden, weight, labels, known


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("tokens", "vocab", "k"), [(16, 152_064, 64), (5000, 29, 7), (1, 7, 7)], ids=str)
def test_large_and_small(name: str, tokens: int, vocab: int, k: int) -> None:
    """No further from float64 than the same formula on full float32 logits, plus 10 %.

    Mean of six draws: where 152,064 numbers are summed, one draw's error is chance (0.7 to 1.3 times the naive one's).
    """
    if name == "eaft" and vocab < 20:
        pytest.skip("eaft looks at the 20 largest")
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(6):
        triples = zip(*both(name, *drawn(tokens, vocab, torch.float32, k, seed=seed)), strict=True)
        for column, (ours, exact, naive) in enumerate(triples):
            for row, value in enumerate((ours, naive)):
                errors[row, column] += (value.double() - exact).norm() / exact.norm().clamp(min=1e-6) / 6
    assert bool((errors[0] < 1.1 * errors[1] + 1e-5).all()), errors


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(name: str, dtype: torch.dtype) -> None:
    """Logits up to 1e4: finite, and right in float64."""
    hidden, weight, labels, known = drawn(40, 50, dtype, 6, scale=2500.0)
    chunked, dense, _ = both(name, hidden, weight, labels, known, chunk_size=7)
    for ours, exact in zip(chunked, dense, strict=True):
        assert bool(ours.isfinite().all())
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", METHODS)
def test_a_tail_of_all_and_of_nothing(name: str) -> None:
    """Frozen ids of probability zero, so that the tail is everything; and every id listed, so that it is nothing."""
    hidden, weight, labels, known = drawn(12, 30, torch.float64, 30)
    chunked, dense, _ = both(name, hidden, weight, labels, known, chunk_size=5)
    for ours, exact in zip(chunked, dense, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    if name == "reverse_kl":
        return  # infinite: the model keeps mass where the frozen one has none
    ids = torch.arange(30)[None, :3].expand(12, 3).contiguous()
    all_tail = qtarget.Reference(
        label_log_probs=torch.full((12,), -1.0, dtype=torch.float64),
        topk_ids=ids,
        topk_log_probs=torch.full((12, 3), -math.inf, dtype=torch.float64),
        tail_log_mass=torch.zeros(12, dtype=torch.float64),
    )
    chunked, dense, _ = both(name, hidden, weight, labels, all_tail, chunk_size=5)
    for ours, exact in zip(chunked, dense, strict=True):
        assert bool(exact.isfinite().all())
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["idft", "label_smoothing", "asft"])
def test_the_report_is_the_oracles(name: str) -> None:
    hidden, weight, labels, known = drawn(20, 300, torch.float64, 5)
    labels = torch.where(torch.arange(20) % 2 == 0, (hidden @ weight.T).argmax(-1), labels)
    arguments = {"reference": known} if name == "asft" else {}
    reports = [
        qtarget.linear_target_loss(hidden, weight, labels, name, backend=b, return_report=True, **arguments)[1]
        for b in ("chunked", "dense")
    ]
    assert float(reports[0].correct.sum()) >= 10
    for ours, exact in zip(vars(reports[0]).values(), vars(reports[1]).values(), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
