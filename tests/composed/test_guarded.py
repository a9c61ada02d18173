"""The guard, token by token, from the papers' formulas on full float64 logits.

``(1 - t) g_label + t g_sft + (1 - d) g_residual`` with ``t = d A / (A + 0.02)``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.errors import IncompatibleError, MissingStatisticError
from tests.conformance import formulas
from tests.conformance.cases import Batch, frozen_arguments, make_batch, tokens, with_counted

CASES: list[tuple[str, dict[str, Any]]] = [
    ("asft", {"kl_weight": 0.7}),
    ("target_sft", {"eta": 0.3}),
    ("dft", {}),
    ("p_power", {"alpha": 0.5}),
    ("gift", {"beta": 1.5, "smoothing": 0.2}),
    ("prior_surprise", {}),
    ("consensus", {"caution": 1.0}),
    ("label_smoothing", {"smoothing": 0.1}),
]
HARD = ("dft", "p_power", "label_smoothing")
"""These need no frozen model of their own: the conflict is asked of the reference."""


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def conflict_of(batch: Batch) -> Tensor:
    """From 0 to 0.95, in no order."""
    count = batch.labels.numel()
    return (torch.arange(count, dtype=torch.float64) * 7 % count / count * 0.95).reshape(batch.labels.shape)


def guarded_arguments(name: str, batch: Batch, conflict: Tensor) -> dict[str, Any]:
    given = frozen_arguments(name, batch) or {"reference": qtarget.Reference()}
    agreed = formulas.agreement(batch.labels).double()
    return {role: replace(known, conflict=conflict, agreement=agreed) for role, known in given.items()}


def supported(batch: Batch) -> Tensor:
    """``A / (A + 0.02)`` at every label."""
    agreed = formulas.agreement(batch.labels).double()
    return agreed / (agreed + 0.02)


def label_part(name: str, settings: dict[str, Any], x: formulas.Tokens) -> Tensor:
    """What of the paper's loss pulls towards the label."""
    if name in ("dft", "p_power", "prior_surprise"):
        return formulas.losses(name, x, settings)
    if name == "gift":
        mixed = (1 - settings["smoothing"]) * x.frozen_lp_y.exp() + settings["smoothing"] / x.lp.shape[-1]
        bonus = torch.expm1(torch.tensor(settings["beta"], dtype=torch.float64)) * mixed
        return -bonus / (1 + bonus) * x.lp_y
    row = formulas.table_row(name, x, settings)
    assert row is not None
    return -(row.c * row.a).detach() * x.lp_y


def expected_loss(name: str, settings: dict[str, Any], x: formulas.Tokens, conflict: Tensor, share: Tensor) -> Tensor:
    label, trust = label_part(name, settings, x), conflict * share
    residual = formulas.losses(name, x, settings) - label
    return ((1 - trust) * label - trust * x.lp_y + (1 - conflict) * residual).sum()


@pytest.mark.parametrize("form", ["dense", "chunked"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_value_and_gradient_are_the_mixture(name: str, settings: dict[str, Any], form: str) -> None:
    batch = make_batch()
    conflict = conflict_of(batch)
    target = qtarget.Guarded(qtarget.get_target(name, **settings))
    assert (target.name, target.scope) == (f"guarded {name}", "token")
    hidden = batch.hidden.clone().requires_grad_()
    x = tokens(batch, hidden @ batch.weight.T)
    share = supported(batch)[batch.kept]
    expected = expected_loss(name, settings, x, conflict[batch.kept], share)
    (gradient,) = torch.autograd.grad(expected, hidden)
    arguments = {"reduction": "sum", "return_report": True, **guarded_arguments(name, batch, conflict)}
    if form == "dense":
        loss, report = qtarget.target_loss(hidden @ batch.weight.T, batch.labels, target, **arguments)
    else:
        loss, report = qtarget.linear_target_loss(hidden, batch.weight, batch.labels, target, chunk_size=4, **arguments)
    close(loss.detach(), expected.detach())
    close(torch.autograd.grad(loss, hidden)[0], gradient)
    row = formulas.table_row(name, x, settings)
    assert row is not None
    if name != "gift":  # its row is written with Q as a whole
        close(
            report.label_weights[batch.kept],
            (row.c * row.a * (1 - conflict[batch.kept] * share) + conflict[batch.kept] * share).detach(),
        )
        close(report.residual_weights[batch.kept], ((1 - conflict[batch.kept]) * row.c * row.b).detach())


def gradient_of(method: Any, logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
    leaf = logits.clone().requires_grad_()
    qtarget.target_loss(leaf, labels, method, reduction="sum", **given).backward()
    assert leaf.grad is not None
    return leaf.grad


def mixture_of_gradients(target: Any, batch: Batch, given: dict[str, Any], conflict: Tensor) -> Tensor:
    """From the target's own gradients: loss weights reach its label part alone, so a weight of zero leaves the residual."""
    trust = conflict * supported(batch)
    whole = gradient_of(target, batch.logits, batch.labels, loss_weights=1 - trust, weights_scale="label", **given)
    residual = gradient_of(
        target, batch.logits, batch.labels, loss_weights=torch.zeros_like(trust), weights_scale="label", **given
    )
    by_sft = gradient_of("sft", batch.logits, batch.labels, loss_weights=trust)
    return whole - conflict[..., None] * residual + by_sft


@pytest.mark.parametrize("conflict", [0.0, 1.0])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_without_conflict_it_is_the_target_and_in_full_conflict_the_base_has_no_pull(
    name: str, settings: dict[str, Any], conflict: float
) -> None:
    batch = make_batch()
    target, given = qtarget.get_target(name, **settings), frozen_arguments(name, batch)
    everywhere = torch.full_like(conflict_of(batch), conflict)
    found = gradient_of(
        qtarget.Guarded(target), batch.logits, batch.labels, **guarded_arguments(name, batch, everywhere)
    )
    close(found, mixture_of_gradients(target, batch, given, everywhere))
    if not conflict:
        close(found, gradient_of(target, batch.logits, batch.labels, **given))


def test_no_label_weighs_less_than_in_the_target_or_more_than_in_sft() -> None:
    batch = make_batch()
    conflict = conflict_of(batch)
    for name, settings in (("asft", {"kl_weight": 0.7}), ("sft_kl", {"kl_weight": 0.7})):
        weights = []
        for method in (qtarget.get_target(name, **settings), qtarget.Guarded(qtarget.get_target(name, **settings))):
            given = guarded_arguments("asft", batch, conflict)
            _, report = qtarget.target_loss(batch.logits, batch.labels, method, return_report=True, **given)
            weights.append(report.label_weights[batch.kept])
        assert (weights[1] >= weights[0] - 1e-12).all() and (weights[1] <= 1 + 1e-12).all()
        assert (weights[1] > weights[0]).any() == (name == "asft")


@pytest.mark.parametrize("name", ["asft", "target_sft", "consensus"])
def test_on_top_k_and_a_tail(name: str) -> None:
    """The mixture of the gradients on the same sparse numbers; that those are right is the conformance suite's."""
    batch = make_batch()
    conflict, role = conflict_of(batch), formulas.FROZEN[name][0]
    stats = qtarget.token_statistics(batch.frozen, batch.labels, top_k=5)
    known, target = with_counted("consensus", stats, batch.labels), qtarget.get_target(name)
    given = {role: replace(known, conflict=conflict)}
    found = gradient_of(qtarget.Guarded(target), batch.logits, batch.labels, **given)
    close(found, mixture_of_gradients(target, batch, {role: known}, conflict))


def test_the_conflict_is_that_of_the_model_which_the_target_follows() -> None:
    roles = {name: qtarget.Guarded(qtarget.get_target(name)).prior for name, _ in CASES}
    assert roles == {name: formulas.FROZEN.get(name, ("reference", ""))[0] for name, _ in CASES}
    assert roles["target_sft"] == "teacher"
    assert all(roles[name] == "reference" for name in HARD)


@pytest.mark.parametrize("name", ["asft", "target_sft", "dft"])
def test_a_missing_conflict_names_its_role_and_where_it_comes_from(name: str) -> None:
    batch = make_batch()
    target = qtarget.Guarded(qtarget.get_target(name))
    given = frozen_arguments(name, batch)
    head = qtarget.FrozenHead(batch.hidden, batch.weight)
    role = "teacher" if name == "target_sft" else "reference"
    words = rf"'guarded {name}' needs {role}\.conflict.*pass {role}=qtarget\.Reference\(conflict=.*set|{role}_cache"
    for arguments in (given, {role: head}):
        with pytest.raises(MissingStatisticError, match=words) as raised:
            qtarget.linear_target_loss(batch.hidden, batch.weight, batch.labels, target, **arguments)
        assert f"`{role}_cache`" in str(raised.value)
        assert ("--role teacher" in str(raised.value)) == (role == "teacher")


@pytest.mark.parametrize("name", ["talr", "rho1", "iw_sft", "inverse_likelihood"])
def test_wider_scopes_are_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"'{name}' weighs a whole (batch|sequence).*token scope"):
        qtarget.Guarded(qtarget.get_target(name))


@pytest.mark.parametrize("name", ["distillation", "reverse_kl", "taid"])
def test_targets_that_never_see_the_label_are_refused(name: str) -> None:
    with pytest.raises(IncompatibleError, match=rf"'{name}' never looks at the observed token.*without guard"):
        qtarget.Guarded(qtarget.get_target(name))


def test_a_combination_can_be_guarded() -> None:
    """``dft+sft_kl`` is asft, also under the guard."""
    batch = make_batch()
    conflict = conflict_of(batch)
    given = guarded_arguments("asft", batch, conflict)
    losses = [
        qtarget.target_loss(
            batch.logits, batch.labels, qtarget.Guarded(qtarget.get_target(name, kl_weight=0.7)), **given
        )
        for name in ("asft", "dft+sft_kl")
    ]
    close(losses[0], losses[1])
    x = tokens(batch, batch.logits)
    expected = expected_loss("asft", {"kl_weight": 0.7}, x, conflict[batch.kept], supported(batch)[batch.kept]) / int(
        batch.kept.sum()
    )
    close(losses[1], expected)
