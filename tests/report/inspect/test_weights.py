"""Weights, gradients and Q from listed numbers against the loss itself on full logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import qtarget
from qtarget.data.agreement import agreement, confident_choices, context_trust, prior_conflict, prior_reliability
from qtarget.data.crossfit.witness import verdict
from qtarget.registry import available_targets
from qtarget.report.inspect.weights import target_numbers, unavailable
from qtarget.report.tokens import ModelNumbers, flatten_rows

VOCAB, ROWS, LENGTH = 40, 4, 9


def model_numbers(logits, labels, top_k, name="m", tail_policy="bucket"):
    stats = qtarget.token_statistics(logits, labels, top_k=top_k)
    parts = {
        f: getattr(stats, f) for f in ("label_log_probs", "entropy", "topk_ids", "topk_log_probs", "tail_log_mass")
    }
    arrays = {f: v.float().numpy() if v.is_floating_point() else v.numpy() for f, v in parts.items() if v is not None}
    return ModelNumbers(name, logits.shape[-1], **arrays, tail_policy=tail_policy)


@pytest.fixture(scope="module")
def case():
    """Logits ``[rows, trained, vocab]`` of a base, a later checkpoint and a teacher, and the rows they belong to."""
    generator = torch.Generator().manual_seed(0)
    base, teacher, later = (2 * torch.randn(ROWS, LENGTH, VOCAB, generator=generator) for _ in range(3))
    base[:, 1, 3] += 12.0  # a bias: the base says 3 here, whatever the rows say
    teacher, later = base + 0.5 * teacher, base + 0.3 * later
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    labels[1:, 0], labels[2, 3:7] = 17, labels[3, 3:7]  # something that rows agree on
    labels[0, 0], labels[1, 2] = base[0, 0].argmax(), base[1, 2].argmin()
    rows = [{"input_ids": [1, *row.tolist()], "labels": [-100, *row.tolist()]} for row in labels]
    return base, teacher, later, labels, flatten_rows(rows)


def crossfit_of(log_probs):
    """Copies that find some labels likelier than the base does, and some less."""
    return (0.5 * log_probs - 0.1 * (torch.arange(log_probs.numel()) % 3).view_as(log_probs)).float()


def with_rows(known, labels):
    """What the rows of the case say of one another, row by row."""
    rows, masks = [[1, *row] for row in labels.tolist()], [[False] + [True] * LENGTH] * ROWS
    log_probs = list(known.label_log_probs.numpy())
    agreed = agreement(rows, masks)
    said = [confident_choices(np.arange(VOCAB)[None].repeat(LENGTH, 0), row) for row in known.log_probs.numpy()]
    trust = [context_trust(values) for values in agreed]
    conflict = np.stack(prior_conflict(rows, masks, log_probs, said, trust))
    assert conflict[0, 1] == 1, "the bias does not show"
    rho = prior_reliability(np.concatenate(agreed), np.concatenate(log_probs), np.concatenate(trust))
    counted = {"agreement": np.stack(agreed), "reliability": rho * (1 - conflict), "conflict": conflict}
    assert all(values.max() > 0.01 for values in counted.values()), "the case is too weak to tell"
    copies, row_of = crossfit_of(known.label_log_probs).numpy(), np.repeat(np.arange(ROWS), LENGTH)
    told = verdict(known.label_log_probs.numpy().ravel(), copies.ravel(), row_of)
    counted |= {"crossfit": np.exp(copies), **{n: np.full_like(copies, value) for n, value in vars(told).items()}}
    return replace(known, **{name: torch.from_numpy(values).float() for name, values in counted.items()})


def built(name):
    first, _, rest = name.partition(" ")
    return qtarget.Guarded(qtarget.get_target(rest)) if first == "guarded" else qtarget.get_target(name)


def by_autograd(target, live, labels, reference, teacher):
    """Report and logit gradient of the loss itself: full distributions, sum over tokens."""
    logits = live.clone().requires_grad_()
    loss, report = qtarget.target_loss(
        logits,
        labels,
        target,
        reference=with_rows(qtarget.Reference.from_logits(reference, labels), labels),
        teacher=with_rows(qtarget.Reference.from_logits(teacher, labels), labels),
        reduction="sum",
        return_report=True,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    return report, gradient.flatten(0, 1)


NOT_LISTED = {"gem"}
GUARDED = ["guarded asft", "guarded target_sft"]


@pytest.mark.parametrize("at_start", [True, False])
@pytest.mark.parametrize(
    "name", [*sorted(set(available_targets()) - NOT_LISTED), "prior_surprise+label_smoothing", *GUARDED]
)
def test_with_every_token_listed_all_numbers_are_those_of_the_loss(case, name, at_start):
    base, teacher, later, labels, rows = case
    live = base if at_start else later
    target = built(name)
    numbers = [model_numbers(m, labels.flatten(), VOCAB) for m in (x.flatten(0, 1) for x in (live, base, teacher))]
    copies = crossfit_of(torch.from_numpy(numbers[1].label_log_probs)).numpy()
    frozen = {"reference": replace(numbers[1], crossfit=copies), "teacher": numbers[2]}
    assert unavailable(target, numbers[0], frozen) is None
    found = target_numbers(target, rows, numbers[0], frozen, shown=VOCAB)
    report, gradient = by_autograd(target, live, labels, base, teacher)
    np.testing.assert_allclose(found.label_weights, report.label_weights.flatten(), atol=2e-5)
    np.testing.assert_allclose(found.residual_weights, report.residual_weights.flatten(), atol=2e-5)
    np.testing.assert_allclose(found.moved, gradient.abs().sum(-1) / 2, atol=2e-5)
    q = (live.flatten(0, 1).softmax(-1) - gradient).detach()
    p, y = live.flatten(0, 1).softmax(-1), labels.flatten()
    if found.q is None:
        a = torch.from_numpy(found.label_weights)[:, None]
        expected = p + a * (torch.nn.functional.one_hot(y, VOCAB) - p)
        np.testing.assert_allclose(expected, q, atol=2e-3)
    else:
        order = numbers[0].topk_ids
        np.testing.assert_allclose(found.q[:, :-1], q.gather(-1, torch.from_numpy(order)), atol=2e-5)
        np.testing.assert_allclose(found.q[:, -1], q.gather(-1, y[:, None])[:, 0], atol=2e-5)


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize(
    "name",
    ["sft", "dft", "prior_surprise", "iw_sft", "talr", "rho1", "idft", "p_power", "profit", "psft", "label_smoothing"],
)
def test_label_weights_need_no_list_and_are_exact_without(case, name, top_k):
    base, _, _, labels, rows = case
    target = qtarget.get_target(name)
    live = model_numbers(base.flatten(0, 1), labels.flatten(), top_k)
    found = target_numbers(target, rows, live, {"reference": live})
    report, gradient = by_autograd(target, base, labels, base, base)
    np.testing.assert_allclose(found.label_weights, report.label_weights.flatten(), atol=2e-5)
    if name != "label_smoothing":  # its pull on the rest has both signs, which one bucket adds up
        np.testing.assert_allclose(found.moved, gradient.abs().sum(-1) / 2, atol=2e-5)


@pytest.mark.parametrize("name", ["target_sft", "hybrid_distillation", "distillation"])
def test_sparse_teacher_keeps_weights_and_bounds_the_gradient(case, name):
    """On fewer outcomes the mass that moves between them can only look smaller; the label's own weight stays."""
    base, teacher, _, labels, rows = case
    target = qtarget.get_target(name)
    live, frozen = (model_numbers(m.flatten(0, 1), labels.flatten(), 8) for m in (base, teacher))
    found = target_numbers(target, rows, live, {"teacher": frozen})
    report, gradient = by_autograd(target, base, labels, base, teacher)
    np.testing.assert_allclose(found.label_weights, report.label_weights.flatten(), atol=2e-5)
    np.testing.assert_allclose(found.residual_weights, report.residual_weights.flatten(), atol=2e-5)
    if name != "target_sft":  # a mixture of buckets is another mixture
        assert (found.moved <= gradient.abs().sum(-1).numpy() / 2 + 1e-5).all()
        q = base.flatten(0, 1).softmax(-1) - gradient
        np.testing.assert_allclose(found.q[:, -1], q.gather(-1, labels.flatten()[:, None])[:, 0].detach(), atol=2e-5)


def test_data_weights_scale_the_label_term(case):
    base, _, _, labels, _ = case
    weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(1))
    rows = flatten_rows(
        [
            {"input_ids": [1, *y.tolist()], "labels": [-100, *y.tolist()], "loss_weights": [1.0, *w.tolist()]}
            for y, w in zip(labels, weights)
        ]
    )
    live = model_numbers(base.flatten(0, 1), labels.flatten(), 0)
    found = target_numbers(qtarget.get_target("dft"), rows, live, {})
    p = base.softmax(-1).gather(-1, labels[..., None])[..., 0]
    np.testing.assert_allclose(found.label_weights, (weights * p).flatten(), atol=1e-5)
    np.testing.assert_allclose(found.moved, (weights * p * (1 - p)).flatten(), atol=1e-5)


def test_what_cannot_be_shown_says_why(case):
    base, _, _, labels, _ = case
    bare, listed = (model_numbers(base.flatten(0, 1), labels.flatten(), k) for k in (0, 8))
    reasons = {
        "gem": unavailable(qtarget.get_target("gem"), listed, {}),
        "eaft": unavailable(qtarget.get_target("eaft"), listed, {}),
        "prior_surprise": unavailable(qtarget.get_target("prior_surprise"), listed, {}),
        "asft": unavailable(qtarget.get_target("asft"), bare, {"reference": bare}),
    }
    assert "whole distribution" in reasons["gem"]
    assert "top 20" in reasons["eaft"] and "--top_k 20" in reasons["eaft"]
    assert "reference_cache" in reasons["prior_surprise"]
    assert "--top_k" in reasons["asft"]
