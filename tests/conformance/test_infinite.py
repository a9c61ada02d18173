"""Logits of minus infinity: value and gradient are the limits that ever lower logits approach, in every backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.errors import ShapeError
from qtarget.core.types import DATA_FIELDS
from tests import ROOT
from tests.conformance import formulas
from tests.conformance.cases import Batch, frozen_arguments, make_batch
from tests.conformance.test_targets import CASES, close

BANNED = [3, 11]
LOW = (-1e5, -2e5)
"""Logits of banned tokens: their probability is exactly 0 in float64, and what grows with them has no finite limit."""


def banning(batch: Batch, *, labels: bool, frozen: bool) -> Batch:
    """The batch with two labels of its first row banned, or all elsewhere; the frozen model bans the same ids, or none."""
    ids, kept = batch.labels.clone(), batch.kept.nonzero()
    for at in BANNED:
        ids[ids == at] = 5
    if labels:
        for (row, column), at in zip(kept[[1, 4]].tolist(), BANNED, strict=True):
            ids[row, column] = at
    other = batch.frozen.clone()
    if frozen:
        other[..., BANNED] = -torch.inf
    return replace(batch, labels=ids, frozen=other)


def linear(name: str, settings: dict[str, Any], batch: Batch, level: float, backend: str) -> tuple[Tensor, ...]:
    """Summed loss and its gradients with the banned tokens' logits at ``level``."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    bias = torch.zeros(len(weight), dtype=weight.dtype).index_fill(0, torch.tensor(BANNED), level)
    loss = qtarget.linear_target_loss(
        hidden, weight, batch.labels, qtarget.get_target(name, **settings), bias=bias, backend=backend, reduction="sum",
        **frozen_arguments(name, batch),
    )  # fmt: skip
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("case", ["label", "elsewhere"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_banned_token_is_the_limit_of_ever_lower_logits(name: str, settings: dict, case: str, backend: str) -> None:
    batch = banning(make_batch(), labels=case == "label", frozen=case == "elsewhere")
    lower, lowest = (linear(name, settings, batch, level, "dense") for level in LOW)
    found = linear(name, settings, batch, -torch.inf, backend)
    grows = float((lowest[0] - lower[0]).abs()) > 1e-8
    if grows:
        assert found[0] == torch.inf
    else:
        close(found[0], lower[0])
    for gradient, expected in zip(found[1:], lowest[1:], strict=True):
        close(gradient, expected)


FINITE = [
    ("sft", {}, False), ("label_smoothing", {"smoothing": 0.1}, False), ("label_smoothing", {"smoothing": 0.0}, False),
    ("gift", {"smoothing": 0.01}, False), ("hybrid_distillation", {"teacher_weight": 0.5}, False),
    ("prior_surprise", {}, False), ("inverse_likelihood", {}, False), ("sft_kl", {}, False), ("gem", {}, False),
    ("crossfit_consensus", {}, False), ("consensus", {}, False),
    ("eaft", {"top_k": 5}, False), ("talr", {"min_weight": 0.1}, False),
    ("distillation", {}, False), ("forward_kl", {}, False),
    ("hybrid_distillation", {"teacher_weight": 1.0}, False),
    ("dft", {}, True), ("p_power", {"alpha": 0.5}, True), ("p_power", {"alpha": 0.0}, False), ("idft", {}, True),
    ("profit", {}, True), ("psft", {}, True), ("iw_sft", {}, True), ("talr", {"min_weight": 0.0}, True),
    ("target_sft", {}, True), ("taid", {}, True), ("generalized_jsd", {}, True), ("skew_kl", {}, True),
    ("skew_kl", {"alpha": 0.0}, False), ("skew_reverse_kl", {"alpha": 0.0}, True),
    ("generalized_jsd", {"beta": 0.0}, False), ("generalized_jsd", {"beta": 1.0}, True), ("taid", {"interpolation": 1.0}, False),
    ("skew_reverse_kl", {}, True), ("reverse_kl", {}, True),
    ("asft", {"kl_weight": 0.0}, True), ("asft", {"kl_weight": 0.1}, False),
    ("rho1", {"keep_fraction": 0.1}, False), ("token_cleaning", {"keep_fraction": 0.1}, False),
]  # fmt: skip
"""The column "label of probability 0" of docs/loss.md."""


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize(("name", "settings", "finite"), FINITE)
def test_the_table_of_the_docs(name: str, settings: dict[str, Any], finite: bool, backend: str) -> None:
    loss, *gradients = linear(name, settings, banning(make_batch(), labels=True, frozen=False), -torch.inf, backend)
    assert bool(loss.isfinite()) == finite
    assert finite or loss == torch.inf, "infinite for a mathematical reason, never NaN"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_every_target_is_in_the_table() -> None:
    assert {name for name, *_ in FINITE} == set(qtarget.available_targets())
    page = (
        (ROOT / "docs" / "loss.md").read_text(encoding="utf-8").split("## What infinite logits do")[1].split("\n## ")[0]
    )
    assert all(name in page for name in qtarget.available_targets())


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_label_that_both_models_exclude_is_no_nan(name: str, settings: dict[str, Any], backend: str) -> None:
    """Padding rows of both heads are minus infinity, and a row holds such an id: the ratio of the two is 0 / 0."""
    loss, *gradients = linear(name, settings, banning(make_batch(), labels=True, frozen=True), -torch.inf, backend)
    assert not bool(loss.isnan())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("name", [name for name, (_, kind) in formulas.FROZEN.items() if kind != "label"])
def test_top_k_numbers_of_a_model_that_bans_the_same_tokens(name: str, backend: str) -> None:
    """36 of 37 log-probs listed, a banned one among them: as finite as with the whole distribution."""
    role = formulas.FROZEN[name][0]
    batch = banning(make_batch(), labels=False, frozen=True)
    known = qtarget.token_statistics(batch.frozen, batch.labels, top_k=36)
    counted = frozen_arguments(name, batch)[role]
    told = {field: getattr(counted, field) for field in DATA_FIELDS}
    known = replace(known, **told)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    found = []
    for level in (LOW[0], -torch.inf):
        bias = torch.zeros(len(weight), dtype=weight.dtype).index_fill(0, torch.tensor(BANNED), level)
        loss = qtarget.linear_target_loss(
            hidden, weight, batch.labels, name, bias=bias, backend=backend, **{role: known}
        )
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    if name == "gift":  # its uniform share falls on banned tokens too
        assert found[1][0] == torch.inf
        found = [pair[1:] for pair in found]
    for actual, expected in zip(found[1], found[0], strict=True):
        close(actual, expected)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("scale", ["all", "label"])
def test_weight_zero_silences_a_banned_label(scale: str, backend: str) -> None:
    """Under both meanings of weights: the label's pull is gone, in value and gradient."""
    batch = banning(make_batch(), labels=True, frozen=False)
    gone = (batch.labels[..., None] == torch.tensor(BANNED)).any(-1)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    bias = torch.zeros(len(weight), dtype=weight.dtype).index_fill(0, torch.tensor(BANNED), -torch.inf)
    found = []
    for labels, weights in ((batch.labels, (~gone).double()), (batch.labels.masked_fill(gone, -100), None)):
        loss = qtarget.linear_target_loss(
            hidden, weight, labels, "sft", bias=bias, backend=backend, reduction="sum", loss_weights=weights,
            weights_scale=scale,
        )  # fmt: skip
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for actual, expected in zip(*found, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("name", ["dft+label_smoothing", "dft+sft"])
def test_a_combined_weight_takes_its_limit(name: str) -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    target = qtarget.get_target(name, **({"smoothing": 0.0} if "smoothing" in name else {}))
    loss = qtarget.target_loss(logits, torch.tensor([2, 0]), target, reduction="none")
    p = logits[1].detach().softmax(-1)
    close(loss.detach(), torch.stack([torch.zeros((), dtype=torch.float64), -p[0] * p[0].log()]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    close(gradient, torch.stack([torch.zeros(3, dtype=torch.float64), p[0] * (p - torch.eye(3)[0])]))


def test_a_guard_that_trusts_nothing_takes_its_limit() -> None:
    logits = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    known = qtarget.Reference(conflict=torch.zeros(1).double(), agreement=torch.zeros(1).double())
    guarded = qtarget.Guarded(qtarget.get_target("dft"))
    assert qtarget.target_loss(logits, torch.tensor([1]), guarded, reference=known) == 0


def test_a_nan_is_never_hidden_by_a_weight_of_zero() -> None:
    """profit's weight of a NaN is 0; the loss must stay NaN, or a diverged run would go on."""
    logits = torch.tensor([[torch.nan, 0.0, 1.0]])
    assert qtarget.target_loss(logits, torch.tensor([1]), "profit").isnan()


def test_a_median_over_banned_labels_is_no_nan() -> None:
    """talr's temperature is infinite then: finite labels weigh 1, banned ones the least."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64).expand(2, 1, 3)
    losses = qtarget.target_loss(
        logits, torch.tensor([[2], [2]]), qtarget.get_target("talr", min_weight=0.0), reduction="none"
    )
    assert losses.tolist() == [[0.0], [0.0]]
    mixed = torch.tensor([[0, 2], [2, 2]])
    losses = qtarget.target_loss(
        logits.expand(2, 2, 3), mixed, qtarget.get_target("talr", min_weight=0.0), reduction="none"
    )
    close(losses, torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double().log())


# -- clamps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_eaft_where_the_entropy_is_zero(alpha: float) -> None:
    """From nearly certain to certain: a root of an entropy of 0 is 0, and nothing is divided by it."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 8, generator=rng) * 1e-7
    logits[:, 0] += torch.linspace(8, 60, 400)
    logits.requires_grad_()
    target = qtarget.get_target("eaft", alpha=alpha, top_k=4)
    loss = qtarget.target_loss(logits, torch.ones(400, dtype=torch.long), target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(loss.isfinite().all()) and bool(gradient.isfinite().all())
    exact = logits.detach().double().topk(4).values.log_softmax(-1)
    entropy = -(exact.exp() * exact).sum(-1)
    nll = -logits.detach().double().log_softmax(-1)[:, 1]
    expected = (entropy / torch.tensor(4.0).log()) ** alpha * nll
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0.05 if 0 < alpha < 1 else 1e-4)


def test_eaft_of_a_vocabulary_with_fewer_tokens_than_k() -> None:
    """Banned tokens among the k largest: certain of one token, its entropy is 0 and not NaN, and so is the weight."""
    logits = torch.tensor([[5.0, -torch.inf, -torch.inf], [0.0, 0.0, -torch.inf]], dtype=torch.float64)
    for alpha in (0.5, 1.0):
        target = qtarget.get_target("eaft", alpha=alpha, top_k=3)
        losses = qtarget.target_loss(logits, torch.tensor([1, 0]), target, reduction="none")
        half = torch.tensor(2.0).double().log()
        close(losses, torch.stack([0 * half, (half / torch.tensor(3.0).double().log()) ** alpha * half]))


def consensus(live: list[float], base: float, agreement: float, reliability: float, caution: float) -> float:
    """Loss of label 0 where base and rows say these probabilities; the base's distribution is the live one: no anchor."""
    logits = torch.tensor([live], dtype=torch.float64).log()
    known = qtarget.Reference(
        label_log_probs=torch.tensor([base], dtype=torch.float64).log(),
        log_probs=logits,
        agreement=torch.tensor([agreement], dtype=torch.float64),
        reliability=torch.tensor([reliability], dtype=torch.float64),
    )
    target = qtarget.get_target("consensus", caution=caution)
    return float(qtarget.target_loss(logits, torch.tensor([0]), target, reference=known))


def test_consensus_of_a_token_that_nobody_supports() -> None:
    """0 / 0 without caution, which is SFT; with caution the weight is 0, and 0 times minus infinity is 0."""
    assert consensus([0.0, 1.0], 0.0, 0.0, 0.5, caution=1.0) == 0.0
    assert consensus([0.0, 1.0], 0.0, 0.0, 0.5, caution=0.0) == float("inf")
    assert consensus([0.5, 0.5], 0.0, 0.0, 0.5, caution=0.0) == pytest.approx(0.693147, rel=1e-5)
    assert consensus([0.0, 1.0], 0.0, 0.0, 0.5, caution=5e-324) == 0.0
    assert consensus([0.0, 1.0], 0.0, 0.3, 0.0, caution=1.0) == float("inf"), "other rows support it"


# -- ids at the edge of the vocabulary -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("label", [4, -1])
def test_a_label_outside_the_vocabulary(label: int, backend: str) -> None:
    hidden, weight, labels = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([3, label])
    with pytest.raises(ShapeError, match="the vocabulary has 4 entries"):
        qtarget.linear_target_loss(hidden, weight, labels, "sft", backend=backend)
    with pytest.raises(ShapeError, match="the vocabulary has 4 entries"):
        qtarget.target_loss(torch.zeros(2, 4), labels, "sft")
    with pytest.raises(ShapeError, match=r"labels range from .* the vocabulary has 4 entries"):
        qtarget.token_statistics(torch.zeros(2, 4), labels)
    with pytest.raises(ShapeError, match=r"labels range from .* the vocabulary has 4 entries"):
        qtarget.token_statistics(hidden=hidden, lm_head_weight=weight, labels=labels)


def test_a_label_outside_frozen_logits() -> None:
    with pytest.raises(ShapeError, match="labels reach 4, the vocabulary of the frozen logits ends at 3"):
        qtarget.Reference.from_logits(torch.zeros(1, 4), torch.tensor([4]))
    assert qtarget.Reference.from_logits(torch.zeros(1, 4), torch.tensor([3])).label_log_probs.exp() == 0.25


def test_a_listed_id_outside_the_vocabulary() -> None:
    known = qtarget.token_statistics(torch.tensor([[0.0, 1.0, 2.0, 9.0]]), torch.tensor([0]), top_k=2)
    assert known.topk_ids.tolist() == [[3, 2]]
    qtarget.target_loss(torch.zeros(1, 4), torch.tensor([0]), "forward_kl", teacher=known)
    with pytest.raises(ShapeError, match="holds id 3, the live vocabulary ends at 2"):
        qtarget.target_loss(torch.zeros(1, 3), torch.tensor([0]), "forward_kl", teacher=known)
