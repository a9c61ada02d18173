"""Every built-in target against its paper's formula, in float64. A new target without an oracle fails here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.errors import IncompatibleError, MissingStatisticError, ShapeError
from tests.conformance import formulas
from tests.conformance.cases import IGNORE, VOCAB, Batch, frozen_arguments, make_batch, oracle_gradient, tokens

CASES = [
    pytest.param(name, settings, id="-".join([name, *(f"{k}={v}" for k, v in settings.items())]))
    for name in qtarget.available_targets()
    for settings in formulas.SETTINGS.get(name, [{}])
]
FIRST = [pytest.param(name, formulas.SETTINGS.get(name, [{}])[0], id=name) for name in qtarget.available_targets()]
ACCUMULATED = {"dft", "target_sft", "sft_kl", "iw_sft", "talr", "rho1"}
"""Each scope and each kind of frozen model once: the chunked loss divides and slices the same way for all."""
NEEDY = [name for name in qtarget.available_targets() if name in formulas.FROZEN]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def dense(name: str, settings: dict[str, Any], batch: Batch, logits: Tensor | None = None, **kwargs: Any):
    """Summed loss and logit gradient of ``qtarget.target_loss``."""
    leaf = (batch.logits if logits is None else logits).detach().clone().requires_grad_()
    target = qtarget.get_target(name, **settings)
    arguments = {"reduction": "sum", **frozen_arguments(name, batch), **kwargs}
    loss = qtarget.target_loss(leaf, batch.labels, target, **arguments)
    loss.backward()
    return loss.detach(), leaf.grad


def linear(name: str, settings: dict[str, Any], batch: Batch, **kwargs: Any):
    """Summed loss and gradients by hidden states and head of ``qtarget.linear_target_loss``."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    target = qtarget.get_target(name, **settings)
    arguments = {"reduction": "sum", **frozen_arguments(name, batch), **kwargs}
    loss = qtarget.linear_target_loss(hidden, weight, batch.labels, target, **arguments)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


# -- value and gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_gradient_are_the_papers(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    loss, gradient = dense(name, settings, batch)
    expected_loss, expected_gradient = oracle_gradient(name, settings, batch)
    assert float(expected_gradient.abs().max()) > 1e-3, "the case is too weak to tell"
    close(loss, expected_loss)
    close(gradient, expected_gradient)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_reductions(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    target, arguments = qtarget.get_target(name, **settings), frozen_arguments(name, batch)
    expected = torch.zeros(batch.labels.shape, dtype=torch.float64)
    expected[batch.kept] = formulas.losses(name, tokens(batch, batch.logits), settings)
    each, detached = qtarget.target_loss(
        batch.logits, batch.labels, target, reduction="none", return_token_losses=True, **arguments
    )
    close(each, expected)
    close(detached, expected)
    count = int(batch.kept.sum())
    close(qtarget.target_loss(batch.logits, batch.labels, target, **arguments), expected.sum() / count)
    for num_items in (50, torch.tensor(50)):
        mean = qtarget.target_loss(batch.logits, batch.labels, target, num_items=num_items, **arguments)
        close(mean, expected.sum() / 50)
        mean = qtarget.linear_target_loss(
            batch.hidden, batch.weight, batch.labels, target, num_items=num_items, **arguments
        )
        close(mean, expected.sum() / 50)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradient_is_the_tables_row(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    x = tokens(batch, batch.logits)
    row = formulas.table_row(name, x, settings)
    if row is None:
        assert name not in formulas.ROWS or qtarget.get_target(name, **settings) != qtarget.get_target(name)
        pytest.skip("this method has no (a, b, q) row")
    p = torch.softmax(x.z, -1)
    a, b, c = row.a[:, None], row.b[:, None], row.c[:, None]
    induced = a * x.one_hot + b * row.q + (1 - a - b) * p
    close(induced.sum(-1), torch.ones(len(x.y), dtype=torch.float64))
    _, gradient = dense(name, settings, batch)
    close(gradient[batch.kept], c * (p - induced))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_gradient_rows_sum_to_zero_and_ignore_a_constant(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    loss, gradient = dense(name, settings, batch)
    close(gradient.sum(-1), torch.zeros(batch.labels.shape, dtype=torch.float64))
    constants = torch.linspace(-30, 30, batch.labels.numel(), dtype=torch.float64).reshape(*batch.labels.shape, 1)
    moved_loss, moved_gradient = dense(name, settings, batch, batch.logits + constants)
    close(moved_loss, loss)
    close(moved_gradient, gradient)


# -- masks ---------------------------------------------------------------------------------------------------------


def poison(value: Tensor, masked: Tensor) -> Tensor:
    out = value.clone()
    out[masked] = torch.nan
    return out


@pytest.mark.parametrize(("name", "settings"), FIRST)
@pytest.mark.parametrize("backend", ["chunked", "dense"])
def test_masked_tokens_get_nothing_even_when_they_are_nan(name: str, settings: dict[str, Any], backend: str) -> None:
    batch = make_batch()
    masked = ~batch.kept
    clean_loss, clean_gradient = oracle_gradient(name, settings, batch)
    arguments = {
        role: known.map_tensors(lambda _, value: poison(value, masked))
        for role, known in frozen_arguments(name, batch).items()
    }
    loss, gradient = dense(name, settings, batch, poison(batch.logits, masked), **arguments)
    close(loss, clean_loss)
    close(gradient, clean_gradient)
    assert bool((gradient[masked] == 0).all())

    sick = Batch(poison(batch.hidden, masked), batch.weight, batch.labels, batch.frozen)
    loss, hidden_grad, weight_grad = linear(name, settings, sick, backend=backend, **arguments)
    close(loss, clean_loss)
    close(hidden_grad, clean_gradient @ batch.weight)
    assert bool((hidden_grad[masked] == 0).all())
    close(weight_grad, clean_gradient.flatten(0, 1).T @ batch.hidden.flatten(0, 1))


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_an_all_masked_batch_is_a_zero_with_a_graph(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    empty = Batch(batch.hidden, batch.weight, torch.full_like(batch.labels, IGNORE), batch.frozen)
    arguments = {"reduction": "mean"}
    loss, gradient = dense(name, settings, empty, num_items=12, **arguments)
    assert float(loss) == 0
    assert bool((gradient == 0).all())
    for backend in ("chunked", "dense"):
        loss, hidden_grad, weight_grad = linear(name, settings, empty, backend=backend, **arguments)
        assert float(loss) == 0
        assert bool((hidden_grad == 0).all())
        assert bool((weight_grad == 0).all())
        _, report = qtarget.linear_target_loss(
            empty.hidden,
            empty.weight,
            empty.labels,
            qtarget.get_target(name, **settings),
            backend=backend,
            return_report=True,
            **frozen_arguments(name, empty),
        )
        close(report.losses, torch.zeros(empty.labels.shape, dtype=torch.float64))
        close(report.label_weights, torch.zeros(empty.labels.shape, dtype=torch.float64))


# -- the chunked loss ----------------------------------------------------------------------------------------------

HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"logit_scale": 0.3, "bias": True},
    {"logit_softcap": 4.0},
    {"logit_softcap": 3.0, "logit_scale": 1.7, "bias": True},
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_chunked_equals_the_formula(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    bias0 = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
    first = settings == formulas.SETTINGS.get(name, [{}])[0]
    sizes_of = ([1, 7, 64, None], [7], [1], [64], [7, None]) if first else ([7],)
    for head, sizes in zip(HEADS, sizes_of):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
        bias = bias0.clone().requires_grad_() if "bias" in head else None
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        logits = logits * head.get("logit_scale", 1.0)
        if cap := head.get("logit_softcap"):
            logits = cap * torch.tanh(logits / cap)
        expected = formulas.losses(name, tokens(batch, logits), settings).sum()
        leaves = [hidden, weight] + ([] if bias is None else [bias])
        gradients = torch.autograd.grad(expected, leaves)
        arguments = {**head, **frozen_arguments(name, batch), **({} if bias is None else {"bias": bias})}
        for size in sizes:
            loss = qtarget.linear_target_loss(
                hidden,
                weight,
                batch.labels,
                qtarget.get_target(name, **settings),
                chunk_size=size,
                reduction="sum",
                **arguments,
            )
            close(loss, expected)
            for ours, theirs in zip(torch.autograd.grad(3.0 * loss, leaves), gradients, strict=True):
                close(ours, 3.0 * theirs)


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_frozen_head_and_frozen_body_skip_their_gradient(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    _, gradient = oracle_gradient(name, settings, batch)
    target, arguments = qtarget.get_target(name, **settings), frozen_arguments(name, batch)
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone()
    qtarget.linear_target_loss(hidden, weight, batch.labels, target, reduction="sum", **arguments).backward()
    assert weight.grad is None
    close(hidden.grad, gradient @ weight)
    hidden, weight = batch.hidden.clone(), batch.weight.clone().requires_grad_()
    qtarget.linear_target_loss(hidden, weight, batch.labels, target, reduction="sum", **arguments).backward()
    assert hidden.grad is None
    close(weight.grad, gradient.flatten(0, 1).T @ hidden.flatten(0, 1))


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_a_frozen_head_stands_for_its_logits(name: str, settings: dict[str, Any]) -> None:
    """Full-vocabulary reference or teacher given as hidden states and head, tempered and capped, against its logits."""
    if name not in formulas.FROZEN:
        pytest.skip("needs no frozen model")
    batch = make_batch()
    other = make_batch(seed=5)
    frozen = 5.0 * torch.tanh(0.8 * (other.hidden @ other.weight.T + 0.1) / 5.0)
    batch = Batch(batch.hidden, batch.weight, batch.labels, frozen)
    bias = torch.full((VOCAB,), 0.1, dtype=torch.float64)
    head = qtarget.FrozenHead(poison(other.hidden, ~batch.kept), other.weight, bias, 0.8, 5.0)
    if name in formulas.COUNTED:  # a head knows nothing of the other rows, or of copies that have not seen this one
        field, made_by = ("agreement", "agreement") if name == "consensus" else ("crossfit", r"crossfit\.witness")
        words = rf"'{name}' needs reference\.{field}.*qtarget.data.{made_by}"
        for backend in ("chunked", "dense"):
            with pytest.raises(MissingStatisticError, match=words):
                linear(name, settings, batch, backend=backend, reference=head)
        return
    expected_loss, expected = oracle_gradient(name, settings, batch)
    for size in (1, 5, None):
        loss, hidden_grad, _ = linear(name, settings, batch, chunk_size=size, **{formulas.FROZEN[name][0]: head})
        close(loss, expected_loss)
        close(hidden_grad, expected @ batch.weight)


# -- order, batches and accumulation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_token_order_does_not_matter(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    loss, gradient = oracle_gradient(name, settings, batch)
    order = torch.randperm(batch.labels.numel(), generator=torch.Generator().manual_seed(1))
    shuffled = Batch(
        batch.hidden.flatten(0, 1)[order],
        batch.weight,
        batch.labels.flatten()[order],
        batch.frozen.flatten(0, 1)[order],
    )
    sequence_ids = batch.sequence_ids().flatten()[order]
    ours, ours_gradient = dense(name, settings, shuffled, sequence_ids=sequence_ids)
    close(ours, loss)
    close(ours_gradient, gradient.flatten(0, 1)[order])
    ours, hidden_grad, _ = linear(name, settings, shuffled, sequence_ids=sequence_ids, chunk_size=4)
    close(ours, loss)
    close(hidden_grad, (gradient @ batch.weight).flatten(0, 1)[order])


@pytest.mark.parametrize(
    ("name", "settings", "form"),
    [pytest.param(*c.values, "dense", id=f"{c.id}-dense") for c in FIRST]
    + [pytest.param(*c.values, "linear", id=f"{c.id}-linear") for c in FIRST if c.id in ACCUMULATED],
)
def test_batch_of_eight_equals_eight_accumulated(name: str, settings: dict[str, Any], form: str) -> None:
    batch = make_batch(batch=8, time=6)
    count = int(batch.kept.sum())
    expected_loss, expected_gradient = oracle_gradient(name, settings, batch)
    expected = torch.einsum("btv,btw->vw", expected_gradient, batch.hidden) / count
    target = qtarget.get_target(name, **settings)
    weights = None
    if target.scope != "token":
        live = qtarget.token_statistics(batch.logits, batch.labels)
        known = frozen_arguments(name, batch).get("reference")
        weights = qtarget.label_weights(target, live.label_log_probs, reference=known, mask=batch.kept)
    weight = batch.weight.clone().requires_grad_()
    total = 0.0
    for i in range(8):
        part = batch.rows(slice(i, i + 1))
        arguments = {
            "num_items": count,
            "label_weights": None if weights is None else weights[i : i + 1],
            **frozen_arguments(name, part),
        }
        if form == "dense":
            loss = qtarget.target_loss(part.hidden @ weight.T, part.labels, target, **arguments)
        else:
            loss = qtarget.linear_target_loss(part.hidden, weight, part.labels, target, chunk_size=2, **arguments)
        loss.backward()
        total += float(loss.detach())
    assert total == pytest.approx(float(expected_loss) / count, rel=1e-10)
    close(weight.grad, expected)


# -- what is missing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDY)
def test_missing_statistics_say_what_and_how(name: str) -> None:
    batch = make_batch()
    role, kind = formulas.FROZEN[name]
    target = qtarget.get_target(name, **formulas.SETTINGS.get(name, [{}])[0])
    only_label = qtarget.Reference(label_log_probs=torch.zeros(batch.labels.shape, dtype=torch.float64))
    only_entropy = qtarget.Reference(entropy=torch.zeros(batch.labels.shape, dtype=torch.float64))
    given = [{}, {role: only_entropy}] + ([{role: only_label}] if kind == "distribution" else [])
    for arguments in given:
        for call in (
            lambda kw: qtarget.target_loss(batch.logits, batch.labels, target, **kw),
            lambda kw: qtarget.linear_target_loss(batch.hidden, batch.weight, batch.labels, target, **kw),
        ):
            with pytest.raises(MissingStatisticError) as raised:
                call(arguments)
            message = str(raised.value)
            assert repr(name) in message
            assert f"needs {role}." in message
            assert "pass " in message
            assert "qtarget score" in message


@pytest.mark.parametrize("name", [n for n in qtarget.available_targets() if qtarget.get_target(n).scope != "token"])
def test_batch_scope_targets_need_sequences(name: str) -> None:
    batch = make_batch()
    flat = Batch(batch.hidden.flatten(0, 1), batch.weight, batch.labels.flatten(), batch.frozen.flatten(0, 1))
    with pytest.raises(MissingStatisticError, match=f"{name}.*sequence_ids"):
        dense(name, {}, flat)


# -- the two parts of a loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_flags_agree_with_the_coefficients(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    target = qtarget.get_target(name, **settings)
    _, report = qtarget.target_loss(
        batch.logits, batch.labels, target, return_report=True, **frozen_arguments(name, batch)
    )
    assert target.has_label_term == bool((report.label_weights != 0).any())
    assert target.has_residual == bool((report.residual_weights != 0).any())


def split_losses(name: str, settings: dict[str, Any], x: formulas.Tokens) -> tuple[Tensor, Tensor]:
    """Label and residual part of the paper's loss, told apart by what is left when the label's pull is taken away."""
    a = formulas.table_row(name, x, settings)
    assert a is not None
    label = -(a.a * a.c).detach() * x.lp_y
    return label, formulas.losses(name, x, settings) - label


@pytest.mark.parametrize(("name", "settings"), FIRST)
def test_weights_scale_label_leaves_the_residual(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    weights = torch.linspace(0, 2, batch.labels.numel(), dtype=torch.float64).reshape(batch.labels.shape)
    if not qtarget.get_target(name).has_label_term:
        for call in (dense, linear):
            with pytest.raises(IncompatibleError, match="observed token"):
                call(name, settings, batch, loss_weights=weights, weights_scale="label")
        return
    leaf = batch.logits.clone().requires_grad_()
    label, residual = split_losses(name, settings, tokens(batch, leaf))
    if name == "gift":  # the row is written with Q as a whole; its label part is w_y (e^beta - 1) / Z
        x = tokens(batch, leaf)
        bonus = (0.99 * x.frozen_lp_y.exp() + 0.01 / VOCAB) * (torch.e**20 - 1)
        whole = label + residual
        label = -bonus / (1 + bonus) * x.lp_y
        residual = whole - label
    (expected,) = torch.autograd.grad((weights[batch.kept] * label + residual).sum(), leaf)
    _, gradient = dense(name, settings, batch, loss_weights=weights, weights_scale="label")
    close(gradient, expected)
    _, hidden_grad, _ = linear(name, settings, batch, loss_weights=weights, weights_scale="label", chunk_size=5)
    close(hidden_grad, expected @ batch.weight)
    _, report = qtarget.target_loss(
        batch.logits,
        batch.labels,
        qtarget.get_target(name, **settings),
        loss_weights=weights,
        weights_scale="label",
        return_report=True,
        **frozen_arguments(name, batch),
    )
    _, plain = qtarget.target_loss(
        batch.logits,
        batch.labels,
        qtarget.get_target(name, **settings),
        return_report=True,
        **frozen_arguments(name, batch),
    )
    close(report.label_weights, weights * plain.label_weights)
    close(report.residual_weights, plain.residual_weights)


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "form"),
    [pytest.param(*c.values, "dense", id=f"{c.id}-dense") for c in FIRST]
    + [pytest.param(*c.values, "chunked", id=f"{c.id}-chunked") for c in CASES],
)
def test_report_against_brute_force(name: str, settings: dict[str, Any], form: str) -> None:
    batch = make_batch()
    target, arguments = qtarget.get_target(name, **settings), frozen_arguments(name, batch)
    if form == "dense":
        _, report = qtarget.target_loss(batch.logits, batch.labels, target, return_report=True, **arguments)
    else:
        _, report = qtarget.linear_target_loss(
            batch.hidden, batch.weight, batch.labels, target, return_report=True, chunk_size=4, **arguments
        )
    x = tokens(batch, batch.logits)
    p = torch.softmax(x.z, -1)
    expected = {
        "losses": formulas.losses(name, x, settings),
        "label_log_probs": torch.stack([row[y].log() for row, y in zip(p, x.y, strict=True)]),
        "entropy": torch.stack([-sum(v * v.log() for v in row) for row in p]),
        "correct": torch.tensor([float(row.tolist().index(max(row)) == y) for row, y in zip(p, x.y, strict=True)]),
    }
    row = formulas.table_row(name, x, settings)
    if row is not None and name != "gift":  # gift's row is written with Q as a whole
        expected |= {"label_weights": row.c * row.a, "residual_weights": row.c * row.b}
    for field, value in expected.items():
        full = torch.zeros(batch.labels.shape, dtype=torch.float64)
        full[batch.kept] = value.double()
        close(getattr(report, field), full)
        assert not getattr(report, field).requires_grad


def test_report_of_gift() -> None:
    """``Q = (w + (e^beta - 1) w_y d_y) / Z`` by hand: ``p_ref = (1/4, 3/4)``, no smoothing, ``e^beta = 5``."""
    reference = qtarget.Reference.from_logits(torch.tensor([[0.25, 0.75]]).double().log(), torch.tensor([0]))
    target = qtarget.get_target("gift", beta=torch.log(torch.tensor(5.0).double()).item(), smoothing=0.0)
    logits = torch.zeros(1, 2, dtype=torch.float64)
    _, report = qtarget.target_loss(logits, torch.tensor([0]), target, reference=reference, return_report=True)
    assert float(report.label_weights) == pytest.approx(1 / 2)  # Z = 1 + 4/4 = 2; a = 1/2
    assert float(report.residual_weights) == pytest.approx(1 / 2)


# -- given label weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in qtarget.available_targets() if qtarget.get_target(n).scope != "token"])
def test_label_weights_over_the_union(name: str) -> None:
    """``qtarget.label_weights`` with a mask, and the same numbers given flat, against the formula's weight."""
    settings = formulas.SETTINGS[name][0]
    batch = make_batch()
    x = tokens(batch, batch.logits)
    row = formulas.table_row(name, x, settings)
    assert row is not None
    live = torch.log_softmax(batch.logits, -1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    known = frozen_arguments(name, batch).get("reference")
    expected = torch.zeros(batch.labels.shape, dtype=torch.float64)
    expected[batch.kept] = row.a
    target = qtarget.get_target(name, **settings)
    ours = qtarget.label_weights(target, poison(live, ~batch.kept), reference=known, mask=batch.kept)
    close(ours, expected)
    flat_known = None if known is None else qtarget.Reference(label_log_probs=known.label_log_probs[batch.kept])
    close(qtarget.label_weights(target, live[batch.kept], reference=flat_known, sequence_ids=x.sequence), row.a)


def test_misaligned_inputs_raise() -> None:
    batch = make_batch()
    with pytest.raises(ShapeError, match="labels"):
        qtarget.target_loss(batch.logits[:, 1:], batch.labels, "sft")
    with pytest.raises(ShapeError, match="vocabulary"):
        qtarget.target_loss(batch.logits, batch.labels.masked_fill(batch.kept, VOCAB), "sft")
    known = qtarget.Reference(label_log_probs=torch.zeros(3, 6))
    with pytest.raises(ShapeError, match="aligned"):
        qtarget.target_loss(batch.logits, batch.labels, "prior_surprise", reference=known)
    known = qtarget.Reference.from_logits(batch.frozen[..., :-1], batch.labels.clamp(max=VOCAB - 2))
    with pytest.raises(ShapeError, match="vocabulary"):
        qtarget.target_loss(batch.logits, batch.labels, "forward_kl", teacher=known)
    wrong = batch.labels.masked_fill(batch.kept, VOCAB)
    with pytest.raises(ShapeError, match="vocabulary"):
        qtarget.target_loss(batch.logits, wrong, "forward_kl", teacher_logits=batch.frozen)
