"""The Triton kernels against the PyTorch ones: in Triton's interpreter without a GPU, on the GPU with one."""

from __future__ import annotations

import pytest
import torch

import qtarget
from qtarget.core.errors import IncompatibleError
from qtarget.loss.columns import RestGradient
from qtarget.loss.kernels import pytorch

triton_rows = pytest.importorskip("qtarget.loss.kernels.triton", reason="Triton is not installed: pip install triton")
DEVICE = "cpu" if triton_rows.INTERPRETED else "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

SHAPES = [(1, 7), (3, 4096), (2, 4097), (5, 9001)]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def drawn(count: int, vocab: int, dtype: torch.dtype, scale: float, aside: int = 2) -> torch.Tensor:
    rng = torch.Generator().manual_seed(count * vocab)
    logits = scale * torch.randn(count, vocab, generator=rng)
    logits.scatter_(-1, torch.randint(vocab, (count, aside), generator=rng), -torch.inf)
    return logits.to(DEVICE, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_sums_are_those_of_float64(shape: tuple[int, int], dtype: torch.dtype, scale: float) -> None:
    logits = drawn(*shape, dtype, scale)
    exact = pytorch.rest_sums(logits.double(), entropy=True)
    ours = triton_rows.rest_sums(logits, entropy=True)
    assert ours.maximum.dtype == torch.float32
    torch.testing.assert_close(ours.maximum.double(), exact.maximum)
    torch.testing.assert_close(ours.exp.double(), exact.exp, rtol=1e-5, atol=0)
    assert ours.exp_x is not None
    torch.testing.assert_close(ours.exp_x.double(), exact.exp_x, rtol=1e-5, atol=1e-5)
    assert triton_rows.rest_sums(logits, entropy=False).exp_x is None


def test_sums_of_nothing() -> None:
    """Every column set aside, and no row at all."""
    ours = triton_rows.rest_sums(torch.full((2, 5), -torch.inf, device=DEVICE), entropy=True)
    assert ours.exp.tolist() == [0.0, 0.0]
    assert ours.maximum.tolist() == [pytest.approx(-1e30)] * 2
    assert len(triton_rows.rest_sums(torch.zeros(0, 5, device=DEVICE), entropy=True).exp) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items(), ids=str)
@pytest.mark.parametrize("parts", ["factor", "slope", "level", "softcap", "all"])
def test_the_gradient_is_the_formulas(shape: tuple[int, int], dtype: torch.dtype, tolerance: float, parts: str) -> None:
    logits = drawn(*shape, dtype, 3.0, aside=0)
    rng = torch.Generator().manual_seed(1)
    number = lambda: torch.randn(shape[0], generator=rng).to(DEVICE)  # noqa: E731
    gradient = RestGradient(
        logits.float().amax(-1),
        number(),
        number() if parts in ("slope", "all") else None,
        number() if parts in ("level", "all") else None,
    )
    softcap = 20.0 if parts in ("softcap", "all") else None
    x = logits.double() - gradient.shift[:, None].double()
    line = gradient.factor[:, None].double()
    line = line if gradient.slope is None else line + gradient.slope[:, None].double() * x
    expected = x.exp() * line + (0 if gradient.level is None else gradient.level[:, None].double())
    expected = expected if softcap is None else expected * (1 - (logits.double() / softcap) ** 2)
    for kernels in (pytorch, triton_rows):
        ours = logits.clone()
        kernels.overwrite_with_gradient(ours, gradient, softcap)
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sft", "dft", "label_smoothing", "eaft", "idft", "asft", "target_sft", "reverse_kl"])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_the_loss_is_the_oracles(name: str, softcap: float | None) -> None:
    """Whole loss and gradients in two chunks, against dense autograd; top-k with a bucket, label inside and outside."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=rng).to(DEVICE).requires_grad_()
    weight = torch.randn(4500, 8, generator=rng).to(DEVICE).requires_grad_()
    other = hidden.detach() + 0.5
    labels = torch.randint(4500, (6,), generator=rng).to(DEVICE)
    labels[2] = -100
    labels[3] = (other @ weight.T)[3].argmax()
    known = qtarget.token_statistics(other.detach() @ weight.detach().T, labels, top_k=9)
    target = qtarget.get_target(name)
    arguments = {role: known for role in ("reference", "teacher") if getattr(target.needs, role)}
    results = []
    for backend in ("dense", "triton"):
        loss, report = qtarget.linear_target_loss(
            hidden, weight, labels, target, backend=backend, chunk_size=4 if backend == "triton" else None,
            logit_softcap=softcap, logit_scale=0.7, return_report=True, **arguments,
        )  # fmt: skip
        results.append((loss.detach(), *torch.autograd.grad(2.0 * loss, (hidden, weight)), *vars(report).values()))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


def test_the_operators_are_registered_rightly() -> None:
    """Schema, fake version and mutation, by torch's own checks."""
    logits = torch.randn(2, 50, device=DEVICE)
    number = torch.ones(2, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.qtarget.rest_sums, (logits, True), test_utils=checks)
    arguments = (logits.clone(), number, number, None, number, 0.0)
    torch.library.opcheck(torch.ops.qtarget.overwrite_with_gradient, arguments, test_utils=checks)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    for logits in (torch.zeros(2, 5, dtype=torch.float64, device=DEVICE), torch.zeros(5, 2, device=DEVICE).T):
        with pytest.raises(IncompatibleError, match="backend='chunked'"):
            triton_rows.rest_sums(logits, entropy=False)
    hidden, weight = torch.zeros(2, 3, device=DEVICE), torch.zeros(5, 3, device=DEVICE)
    labels = torch.zeros(2, dtype=torch.long, device=DEVICE)
    with pytest.raises(IncompatibleError, match="gem reads the whole log-softmax"):
        qtarget.linear_target_loss(hidden, weight, labels, "gem", backend="triton")
    with pytest.raises(IncompatibleError, match="float64"):
        qtarget.linear_target_loss(hidden.double(), weight.double(), labels, "sft", backend="triton")


def test_the_same_bits_every_time() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=rng).to(DEVICE).requires_grad_()
    weight = torch.randn(300, 8, generator=rng).to(DEVICE).requires_grad_()
    labels = torch.arange(5, device=DEVICE)
    runs = []
    for _ in range(2):
        loss = qtarget.linear_target_loss(hidden, weight, labels, "eaft", backend="triton")
        runs.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["sft", "dft", "idft", "label_smoothing", "asft", "gift"])
def test_banned_tokens_are_what_they_are_in_the_oracle(name: str) -> None:
    """A bias of minus infinity, at a label too: the same infinity or limit, and the same gradient."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=rng), torch.randn(30, 4, generator=rng)
    bias = torch.zeros(30).index_fill(0, torch.tensor([3, 11]), -torch.inf).to(DEVICE)
    labels = torch.tensor([1, 3, 5, 7, 11, 2], device=DEVICE)
    known = qtarget.token_statistics((hidden @ weight.T).to(DEVICE) + bias, labels, top_k=4)
    found = []
    for backend in ("triton", "dense"):
        leaves = [t.to(DEVICE).requires_grad_() for t in (hidden.clone(), weight.clone())]
        loss = qtarget.linear_target_loss(*leaves, labels, name, bias=bias, reference=known, backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for ours, oracle in zip(*found, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)
