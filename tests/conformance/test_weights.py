"""A weight scales all that a token teaches, and weight 0 is a mask: against the papers' formulas with masked labels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.errors import HyperparameterError, IncompatibleError
from tests.composed.test_guarded import guarded_arguments
from tests.conformance import formulas
from tests.conformance.cases import IGNORE, Batch, frozen_arguments, make_batch, tokens
from tests.conformance.test_targets import CASES, close

FORMS = [{"backend": "dense"}, {"backend": "chunked", "chunk_size": 4}, None]
"""``linear_target_loss`` with these arguments, or ``target_loss``."""


def weighted(batch: Batch) -> tuple[Tensor, Batch]:
    """Weights from 0 to 2, every third 0, one sequence all 0; and the batch as a mask would have it."""
    count = batch.labels.numel()
    weights = torch.linspace(0.1, 2, count, dtype=torch.float64)
    weights[::3] = 0
    weights = weights.reshape(batch.labels.shape)
    weights[1] = 0
    return weights, replace(batch, labels=batch.labels.masked_fill(weights == 0, IGNORE))


def value_and_gradients(batch: Batch, target: Any, form: dict[str, Any] | None, **arguments: Any) -> list[Tensor]:
    """The mean loss and its gradients by hidden states and head."""
    hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()
    if form is None:
        loss = qtarget.target_loss(hidden @ weight.T, batch.labels, target, **arguments)
    else:
        loss = qtarget.linear_target_loss(hidden, weight, batch.labels, target, **form, **arguments)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("form", FORMS, ids=["dense", "chunked", "logits"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_loss_is_the_weighted_sum_over_the_tokens_left(name: str, settings: dict[str, Any], form: Any) -> None:
    batch = make_batch()
    weights, masked = weighted(batch)
    leaves = (batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_())
    losses = formulas.losses(name, tokens(masked, leaves[0] @ leaves[1].T), settings)
    expected = (weights[masked.kept] * losses).sum() / int((batch.kept & (weights > 0)).sum())
    found = value_and_gradients(
        batch, qtarget.get_target(name, **settings), form, loss_weights=weights, **frozen_arguments(name, masked)
    )
    assert float(expected.detach().abs()) > 1e-6
    for value, right in zip(found, [expected.detach(), *torch.autograd.grad(expected, leaves)], strict=True):
        close(value, right)


def composed() -> list[tuple[str, Any, str]]:
    """A target, and the name of the built-in one whose frozen numbers it takes."""
    chosen = qtarget.get_target
    return [
        ("dft+label_smoothing", chosen("dft+label_smoothing"), "dft"),
        ("talr+sft_kl", chosen("talr+sft_kl"), "sft_kl"),
        ("guarded asft", qtarget.Guarded(chosen("asft")), "asft"),
        ("guarded gift", qtarget.Guarded(chosen("gift")), "gift"),
    ]


@pytest.mark.parametrize("form", FORMS, ids=["dense", "chunked", "logits"])
@pytest.mark.parametrize(("label", "target", "numbers"), composed())
def test_composed_targets_too(label: str, target: Any, numbers: str, form: Any) -> None:
    """Weights of 0 and 1 are the mask, and a third of each weight is a third of the gradient."""
    batch = make_batch()
    weights, masked = weighted(batch)
    known = frozen_arguments(numbers, batch)
    if label.startswith("guarded"):
        known = guarded_arguments(numbers, batch, torch.full(batch.labels.shape, 0.4, dtype=torch.float64))
    by_mask = value_and_gradients(masked, target, form, **known)
    flags = (weights > 0).double()
    for value, right in zip(
        value_and_gradients(batch, target, form, loss_weights=flags, **known), by_mask, strict=True
    ):
        close(value, right)
    for value, right in zip(
        value_and_gradients(batch, target, form, loss_weights=flags / 3, **known), by_mask, strict=True
    ):
        close(value, right / 3)
    assert float(by_mask[1].abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["sft", "asft", "talr"])
def test_split_into_micro_batches(name: str) -> None:
    """``num_items`` counts the tokens of weight above 0; so does each slice."""
    batch = make_batch()
    weights, masked = weighted(batch)
    target = qtarget.get_target(name)
    known = frozen_arguments(name, batch)
    whole = value_and_gradients(batch, target, FORMS[1], loss_weights=weights, **known)
    given: dict[str, Any] = {}
    if target.scope == "batch":
        log_probs = batch.logits.log_softmax(-1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
        given = {"label_weights": qtarget.label_weights(target, log_probs, mask=masked.kept)}
    parts = []
    for row in range(len(batch.labels)):
        at = slice(row, row + 1)
        some = {role: model.map_tensors(lambda _, v, at=at: v[at]) for role, model in known.items()}
        some |= {key: value[at] for key, value in given.items()}
        count = int(masked.kept.sum())
        parts.append(
            value_and_gradients(batch.rows(at), target, FORMS[1], loss_weights=weights[at], num_items=count, **some)
        )
    close(torch.stack([part[0] for part in parts]).sum(), whole[0])
    close(torch.cat([part[1] for part in parts]), whole[1])
    close(torch.stack([part[2] for part in parts]).sum(0), whole[2])


def test_what_stands_at_a_masked_token_does_not_matter() -> None:
    batch = make_batch()
    weights, masked = weighted(batch)
    spoilt = replace(batch, hidden=batch.hidden.masked_fill((weights == 0)[..., None], torch.nan))
    for form in FORMS[:2]:
        for value, right in zip(
            value_and_gradients(spoilt, "label_smoothing", form, loss_weights=weights.masked_fill(weights > 0, 1)),
            value_and_gradients(masked, "label_smoothing", form),
            strict=True,
        ):
            close(value, right)


def test_the_report_holds_scaled_pulls_and_zeros_where_masked() -> None:
    batch = make_batch()
    weights, masked = weighted(batch)
    known = frozen_arguments("asft", batch)
    for form in FORMS:

        def run(labels: Tensor, form: Any = form, **given: Any) -> Any:
            arguments: dict[str, Any] = {"return_report": True, **known, **given}
            if form is None:
                return qtarget.target_loss(batch.logits, labels, "asft", **arguments)
            return qtarget.linear_target_loss(batch.hidden, batch.weight, labels, "asft", **form, **arguments)

        _, report = run(batch.labels, loss_weights=weights)
        _, plain = run(masked.labels)
        close(report.label_weights, weights * plain.label_weights)
        close(report.residual_weights, weights * plain.residual_weights)
        close(report.label_log_probs, plain.label_log_probs)
        assert float(plain.residual_weights.abs().max()) > 1e-3


def test_nothing_left_is_a_loss_of_zero() -> None:
    batch = make_batch()
    nothing = torch.zeros(batch.labels.shape)
    for form in FORMS:
        found = value_and_gradients(batch, "label_smoothing", form, loss_weights=nothing)
        assert all(not value.any() for value in found)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights(bad: float) -> None:
    batch = make_batch()
    weights = torch.ones(batch.labels.shape)
    weights[~batch.kept] = bad  # of a masked token no weight matters
    qtarget.target_loss(batch.logits, batch.labels, "sft", loss_weights=weights)
    weights[batch.kept] = bad
    for scale in ("all", "label"):
        with pytest.raises(HyperparameterError, match="another objective"):
            qtarget.target_loss(batch.logits, batch.labels, "sft", loss_weights=weights, weights_scale=scale)


def test_label_weights_need_a_label_term() -> None:
    batch = make_batch()
    weights = torch.ones(batch.labels.shape)
    known = frozen_arguments("forward_kl", batch)
    with pytest.raises(IncompatibleError, match="weights_scale 'all'"):
        qtarget.target_loss(
            batch.logits, batch.labels, "forward_kl", loss_weights=weights, weights_scale="label", **known
        )
