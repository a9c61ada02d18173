"""Which backend, and why; what the chunked loss hands out, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import qtarget
from qtarget.core.errors import HyperparameterError, IncompatibleError, MissingStatisticError
from qtarget.loss.chunked import default_chunk_size
from qtarget.loss.head import long_product
from qtarget.loss.kernels import pytorch


def leaves(tokens: int = 5, vocab: int = 30, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 4, generator=rng, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, 4, generator=rng, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=rng)


# -- the choice ----------------------------------------------------------------------------------------------------


def test_the_choice_is_explained() -> None:
    hidden, weight, _ = leaves()
    choice = qtarget.explain_backend(hidden, weight, "sft")
    assert choice.backend == "chunked"
    assert "a few columns and sums" in str(choice)
    assert choice.logits_dtype == choice.multiply_dtype == torch.float64
    whole = qtarget.explain_backend(hidden, weight, "gem")
    assert "whole log-softmax" in str(whole)
    live = qtarget.explain_backend(hidden, weight, "reverse_kl", teacher=qtarget.FrozenHead(hidden, weight))
    assert "teacher is a distribution over the whole vocabulary" in str(live)
    known = qtarget.token_statistics(torch.zeros(5, 30), torch.zeros(5, dtype=torch.long), top_k=3)
    assert "a few columns" in str(qtarget.explain_backend(hidden, weight, "reverse_kl", teacher=known))
    spread = qtarget.Reference(**{**vars(known), "tail_policy": "spread"})
    assert "tail is spread" in str(qtarget.explain_backend(hidden, weight, "reverse_kl", teacher=spread))
    assert qtarget.explain_backend(hidden, weight, "sft", backend="dense").chunk_size is None


def test_soft_targets_get_float32_logits_unless_rounding_is_accepted() -> None:
    hidden, weight, _ = leaves(dtype=torch.bfloat16)
    known = qtarget.token_statistics(torch.zeros(5, 30), torch.zeros(5, dtype=torch.long), top_k=3)
    soft = qtarget.explain_backend(hidden, weight, "asft", reference=known)
    assert soft.logits_dtype == torch.float32
    from qtarget.loss.head import multiplies_bfloat16

    accepted = qtarget.explain_backend(hidden, weight, "asft", reference=known, logits_dtype=torch.bfloat16)
    assert accepted.logits_dtype == (torch.bfloat16 if multiplies_bfloat16("cpu") else torch.float32)


def test_bfloat16_products_where_the_cpu_has_instructions_for_them(monkeypatch) -> None:
    """The path of other machines, run here: hard labels in bfloat16 throughout, as close as plain cross entropy."""
    from qtarget.loss import head

    monkeypatch.setattr(head, "multiplies_bfloat16", lambda _: True)
    hidden, weight, labels = leaves(64, 300, torch.bfloat16)
    choice = qtarget.explain_backend(hidden, weight, "sft")
    assert (choice.logits_dtype, choice.multiply_dtype) == (torch.bfloat16, torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels), exact)
    naive = torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight), labels)
    plain = torch.autograd.grad(naive, (hidden, weight))
    for target, arguments in (("sft", {}), ("asft", {"kl_weight": 1e-9})):
        built = qtarget.get_target(target, **arguments)
        known = qtarget.token_statistics(torch.zeros(64, 300), labels, top_k=3)
        loss = qtarget.linear_target_loss(hidden, weight, labels, built, reference=known, chunk_size=32)
        ours = torch.autograd.grad(loss, (hidden, weight))
        if target == "sft":
            for g, p, e in zip(ours, plain, expected, strict=True):
                error = float((g.double() - e).norm() / e.norm())
                assert error < 1.1 * float((p.double() - e).norm() / e.norm()), "worse than naive bfloat16 by over 10 %"


def test_an_unsupported_pair_is_refused() -> None:
    hidden, weight, labels = leaves()
    with pytest.raises(IncompatibleError, match="backend='triton' cannot"):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", backend="triton")  # float64


def test_nothing_to_compile_is_refused() -> None:
    hidden, weight, labels = leaves()
    with pytest.raises(IncompatibleError, match="leave nothing to compile; use backend='auto'"):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", backend="compiled")


def test_impossible_settings_are_refused() -> None:
    hidden, weight, labels = leaves()
    with pytest.raises(HyperparameterError, match="chunk_size=0; expected a whole number"):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", chunk_size=0)
    with pytest.raises(
        HyperparameterError, match=r"logits_dtype=torch.bfloat16; expected torch.float32, or torch.float64"
    ):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", logits_dtype=torch.bfloat16)
    with pytest.raises(MissingStatisticError, match=r"needs reference\.distribution"):
        qtarget.explain_backend(hidden, weight, "asft")
    assert qtarget.explain_backend(hidden.to("meta"), weight.to("meta"), "sft").backend == "chunked"


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, labels = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = qtarget.linear_target_loss(hidden, weight, labels, "sft")
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, labels))


def test_weights_of_another_dtype() -> None:
    """Weights made by numpy are float64."""
    hidden, weight, labels = leaves(dtype=torch.float32)
    factors = torch.linspace(0, 1, 5, dtype=torch.float64)
    for name in ("sft", "gem"):
        ours, dense = (
            qtarget.linear_target_loss(hidden, weight, labels, name, loss_weights=factors, backend=b)
            for b in ("chunked", "dense")
        )
        assert ours.dtype == dense.dtype == torch.float32
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_a_tie_is_not_a_hit(backend: str) -> None:
    hidden, weight, labels = torch.zeros(3, 2), torch.ones(5, 2), torch.tensor([0, 1, 4])
    _, report = qtarget.linear_target_loss(hidden, weight, labels, "sft", backend=backend, return_report=True)
    assert report.correct.tolist() == [0.0, 0.0, 0.0]


def test_a_second_derivative_is_refused_in_words() -> None:
    hidden, weight, labels = leaves()
    loss = qtarget.linear_target_loss(hidden, weight, labels, "sft")
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='dense'"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_chunks_follow_the_memory_but_do_not_starve_the_products() -> None:
    assert default_chunk_size(49152, 0, 4, "cpu") == 256  # 48 MiB
    assert default_chunk_size(49152, 1, 4, "cpu") == 168  # and half as many of the frozen head
    assert default_chunk_size(152_064, 0, 4, "cpu") == 176
    assert default_chunk_size(152_064, 1, 4, "cpu") == 120
    assert default_chunk_size(152_064, 0, 2, "cuda") > 1024 > default_chunk_size(152_064, 1, 4, "cuda") == 640


@pytest.mark.parametrize("target", ["reverse_kl", "target_sft"])
def test_a_frozen_heads_logits_are_made_in_parts_of_a_chunk(target: str) -> None:
    """Each part against its own tokens: 37 labels of 50 in chunks of 16, the frozen logits 8 at a time."""
    hidden, weight, _ = leaves(tokens=50)
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(len(weight), (50,), generator=rng)
    labels[::4] = -100
    frozen = qtarget.FrozenHead(
        torch.randn(50, 4, generator=rng).double(), torch.randn(weight.shape, generator=rng).double()
    )
    role = {"reference": frozen} if qtarget.get_target(target).needs.reference else {"teacher": frozen}
    found = []
    for arguments in ({"backend": "chunked", "chunk_size": 16}, {"backend": "dense"}):
        loss, report = qtarget.linear_target_loss(
            hidden, weight, labels, target, return_report=True, **role, **arguments
        )
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight)), report.losses, report.label_weights))
    for chunked, dense in zip(*found, strict=True):
        torch.testing.assert_close(chunked, dense)


# -- gradients are handed out once ---------------------------------------------------------------------------------


def test_retain_graph_gives_them_again_and_without_it_the_second_backward_is_refused() -> None:
    hidden, weight, labels = leaves()
    loss = qtarget.linear_target_loss(hidden, weight, labels, "sft")
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight), retain_graph=False)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, 3 * b)
    with pytest.raises(RuntimeError, match=r"retain_graph=True|second time"):
        loss.backward()


def test_a_scaler_and_accumulation_only_scale() -> None:
    hidden, weight, labels = leaves()
    scale = torch.tensor(1024.0, dtype=torch.float64)
    (qtarget.linear_target_loss(hidden, weight, labels, "sft") * scale).backward()
    scaled = weight.grad.clone()
    weight.grad = None
    for _ in range(2):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", num_items=10).backward()
    torch.testing.assert_close(weight.grad * 1024, scaled)


def test_gradient_checkpointing() -> None:
    hidden, weight, labels = leaves()
    plain = torch.autograd.grad(qtarget.linear_target_loss(hidden.tanh(), weight, labels, "dft"), (hidden, weight))
    loss = torch.utils.checkpoint.checkpoint(
        lambda h: qtarget.linear_target_loss(h.tanh(), weight, labels, "dft"), hidden, use_reentrant=False
    )
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), plain, strict=True):
        torch.testing.assert_close(a, b)


# -- row operations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [7, 700, 40_000])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("k", [1, 5])
def test_largest_is_topk(vocab: int, transposed: bool, k: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[1] = 0.5  # ties
    logits = logits.T.contiguous().T if transposed else logits
    torch.testing.assert_close(pytorch.largest(logits, k), logits.topk(k).values, rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_over_many_tiles(transposed: bool, monkeypatch) -> None:
    monkeypatch.setitem(pytorch.TILE_BYTES, "cpu", 256)
    logits = 30 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[2] = -torch.inf
    z = logits.T.contiguous().T if transposed else logits
    sums = pytorch.rest_sums(z, entropy=True)
    top = logits.amax(-1).clamp(min=-1e30)
    torch.testing.assert_close(sums.maximum, top)
    x = logits - top[:, None]
    torch.testing.assert_close(sums.exp, x.exp().sum(-1))
    torch.testing.assert_close(sums.exp_x, (x.exp() * x.clamp(min=-1e30)).sum(-1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_last_tile_that_is_not_full(transposed: bool, dtype: torch.dtype, monkeypatch) -> None:
    """Two tokens a tile of five, or 40 columns of 100."""
    monkeypatch.setitem(pytorch.TILE_BYTES, "cpu", 800)
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    z = logits.T.contiguous().T if transposed else logits.clone()
    sums = pytorch.rest_sums(z, entropy=True)
    x = logits.double() - logits.double().amax(-1, keepdim=True)
    torch.testing.assert_close(sums.exp.double(), x.exp().sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.exp_x.double(), (x.exp() * x).sum(-1), rtol=1e-5, atol=0)
    pytorch.overwrite_with_gradient(z, pytorch.RestGradient(logits.double().amax(-1).to(sums.exp.dtype), sums.exp))
    torch.testing.assert_close(z, (x.exp() * x.exp().sum(-1, keepdim=True)).to(dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)], ids=str)
def test_exponentials_take_the_place_of_the_logits(transposed: bool, dtypes, monkeypatch) -> None:
    monkeypatch.setitem(pytorch.TILE_BYTES, "cpu", 4 * 5 * 7)  # seven columns, or one token, a tile
    logits = 8 * torch.randn(5, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtypes[0])
    logits[:, 3] = -torch.inf  # set aside
    z = logits.T.clone().T if transposed else logits.clone()
    values, sums = pytorch.exponentiate(z, dtypes[1], entropy=False)
    exact = (logits - logits.amax(-1, keepdim=True)).exp()
    assert values.dtype == dtypes[1] and values.data_ptr() == z.data_ptr()
    torch.testing.assert_close(values, exact.to(dtypes[1]))
    torch.testing.assert_close(sums.exp, exact.sum(-1))
    factor, slope = torch.tensor([[1, -2, 0, 3, 0.5], [0, 0, 0, 1, -1]], dtype=dtypes[0])
    wide = values.to(dtypes[0], copy=True)
    pytorch.scale_exponentials(values, factor, slope)
    line = factor[:, None] + slope[:, None] * wide.log().clamp(min=-1e30)
    torch.testing.assert_close(values, (wide * line).to(dtypes[1]))
    moved, _ = pytorch.exponentiate(logits.clone(), dtypes[0], entropy=True, maximum=logits.amax(-1) + 2)
    torch.testing.assert_close(moved, exact * torch.tensor(-2.0).exp().to(dtypes[0]))


def test_the_setting_for_bfloat16_products_survives_threads_and_errors(monkeypatch) -> None:
    """It is the process's: a thread that leaves first must not take it from one that is still inside, nor keep it."""
    from qtarget.loss import head

    monkeypatch.setattr(head, "multiplies_bfloat16", lambda _: True)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    first, second = head.bfloat16_operands(), head.bfloat16_operands()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert settings.fp32_precision == before
    with pytest.raises(ZeroDivisionError), head.bfloat16_operands():
        raise ZeroDivisionError
    assert settings.fp32_precision == before


@dataclass(frozen=True)
class EntropyBonus(qtarget.Target):
    """A loss whose gradient has all parts: label, uniform level, and the slope of an entropy."""

    name = "entropy_bonus"
    formula = "-log p_y - mean log p - 0.7 H"
    paper = "this test"
    has_residual = True

    @property
    def needs(self) -> qtarget.Needs:
        return qtarget.Needs(entropy=True, mean_log_prob=True)

    def losses(self, x: qtarget.TokenView) -> qtarget.Terms:
        return qtarget.Terms(label=-x.label_log_probs, residual=-x.mean_log_prob - 0.7 * x.entropy)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_label_level_and_entropy_together(softcap: float | None) -> None:
    hidden, weight, labels = leaves()
    bias = torch.linspace(-1, 1, 30, dtype=torch.float64).requires_grad_()
    loss = qtarget.linear_target_loss(
        hidden, weight, labels, EntropyBonus(), bias=bias, logit_scale=0.5, logit_softcap=softcap, chunk_size=2
    )
    logits = 0.5 * (hidden @ weight.T + bias)
    log_probs = (logits if softcap is None else softcap * (logits / softcap).tanh()).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    exact = (-log_probs[torch.arange(5), labels] - log_probs.mean(-1) - 0.7 * entropy).mean()
    torch.testing.assert_close(loss, exact)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)),
        torch.autograd.grad(exact, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


COMPILED = """
import torch, qtarget
rng = torch.Generator().manual_seed(0)
hidden, weight = torch.randn(5, 4, generator=rng).requires_grad_(), torch.randn(30, 4, generator=rng).requires_grad_()
loss = lambda h: qtarget.linear_target_loss(h.tanh(), weight, torch.arange(5), "dft")
plain = torch.autograd.grad(loss(hidden), (hidden, weight))
compiled = torch.autograd.grad(torch.compile(loss, backend="eager")(hidden), (hidden, weight))
for a, b in zip(compiled, plain, strict=True):
    torch.testing.assert_close(a, b)
"""


@pytest.mark.slow
def test_inside_torch_compile() -> None:
    """Dynamo breaks the graph at the loss and the numbers stay; in a process without the annotations' checker."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1, 2, 7, 64])
@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_long_product_is_the_product(threads: int, vocab: int, tokens: int, transposed: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rng = torch.Generator().manual_seed(vocab)
    left = torch.randn(tokens, vocab, generator=rng, dtype=torch.float64)
    right = torch.randn(vocab, 3, generator=rng, dtype=torch.float64)
    left = left.T.contiguous().T if transposed else left
    torch.testing.assert_close(long_product(left, right), left @ right)


@pytest.mark.parametrize("vocab", [7, 3000])
def test_maxima_of_logits_stored_by_vocabulary(vocab: int, monkeypatch) -> None:
    monkeypatch.setattr(pytorch, "RUN_BYTES", 4 * 5 * 100)
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab)).T.contiguous().T
    logits[1] = -torch.inf
    logits[2, vocab // 2] = torch.nan
    torch.testing.assert_close(pytorch.maxima(logits), logits.amax(-1), rtol=0, atol=0, equal_nan=True)
