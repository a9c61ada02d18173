"""``induced_target`` reads off what a loss teaches: losses with a known answer, and every built-in target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import qtarget
from qtarget.core.errors import LossUnderLensError, ShapeError
from tests.conformance import formulas
from tests.conformance.cases import frozen_arguments, make_batch, tokens

RNG = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 11, generator=RNG, dtype=torch.float64)
LABELS = torch.randint(11, (6,), generator=RNG)
P = torch.softmax(LOGITS, -1)
ONE_HOT = F.one_hot(LABELS, 11).double()
P_Y = P.gather(-1, LABELS[:, None])[:, 0]


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-9) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_cross_entropy_teaches_the_label() -> None:
    seen = qtarget.induced_target(F.cross_entropy, LOGITS, LABELS)
    close(seen.probs, P)
    close(seen.gradient, P - ONE_HOT)
    close(seen.target, ONE_HOT)
    close(seen.label_weight, 1.0)
    close(seen.residual_weight, 0.0)
    assert bool(seen.fits.all())
    assert bool(seen.in_simplex.all())


def test_a_mean_over_the_batch_does_not_scale_the_answer() -> None:
    for reduction in ("mean", "sum", "none"):
        seen = qtarget.induced_target(lambda z, y, r=reduction: F.cross_entropy(z, y, reduction=r), LOGITS, LABELS)
        close(seen.label_weight, 1.0)


@pytest.mark.parametrize("smoothing", [0.1, 0.7])
def test_label_smoothing(smoothing: float) -> None:
    seen = qtarget.induced_target(lambda z, y: F.cross_entropy(z, y, label_smoothing=smoothing), LOGITS.float(), LABELS)
    close(seen.target, (1 - smoothing) * ONE_HOT + smoothing / 11, 1e-6)
    close(seen.label_weight, 1 - smoothing, 1e-6)
    close(seen.residual_weight, smoothing, 1e-6)
    assert bool(seen.fits.all())


@pytest.mark.parametrize("focus", [1.0, 2.0])
def test_focal_loss_is_a_label_weight_that_can_exceed_one(focus: float) -> None:
    def focal(z: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, -1)[0, y]
        return -((1 - log_p.exp()) ** focus) * log_p

    seen = qtarget.induced_target(focal, LOGITS, LABELS)
    expected = (1 - P_Y) ** focus - focus * P_Y * (1 - P_Y) ** (focus - 1) * P_Y.log()
    close(seen.label_weight, expected)
    close(seen.residual_weight, 0.0)
    assert bool(seen.fits.all())
    close(seen.target, expected[:, None] * ONE_HOT + (1 - expected)[:, None] * P)
    if focus == 1.0:
        assert float(expected.max()) > 1.0


def test_an_entropy_bonus_does_not_fit() -> None:
    """``CE - H / 2`` pushes along ``p (log p + H)``: no label and no uniform pull explain that."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, -1)
        return -log_p[0, y] + 0.5 * (log_p.exp() * log_p).sum()

    seen = qtarget.induced_target(loss, LOGITS, LABELS)
    entropy = -(P * P.log()).sum(-1, keepdim=True)
    close(seen.gradient, P - ONE_HOT + 0.5 * P * (P.log() + entropy))
    assert not bool(seen.fits.any())


def test_another_residual_is_found_only_when_named() -> None:
    q = torch.softmax(torch.randn(6, 11, generator=RNG, dtype=torch.float64), -1)

    def loss_of(row: int):
        return lambda z, y: 0.3 * F.cross_entropy(z, y) - 0.7 * (q[row] * torch.log_softmax(z, -1)).sum()

    for i in range(6):
        z, y = LOGITS[i : i + 1], LABELS[i : i + 1]
        named = qtarget.induced_target(loss_of(i), z, y, residual=q[i : i + 1])
        close(named.label_weight, 0.3)
        close(named.residual_weight, 0.7)
        assert bool(named.fits)
        assert not bool(qtarget.induced_target(loss_of(i), z, y).fits)


TABLE = [
    pytest.param(name, settings, id="-".join([name, *(f"{k}={v}" for k, v in settings.items())]))
    for name in qtarget.available_targets()
    if name in formulas.ROWS and qtarget.get_target(name).scope == "token"
    for settings in formulas.SETTINGS.get(name, [{}])
    if settings.get("form") != "logsigmoid" and settings.get("temperature") != 2.0
]


@pytest.mark.parametrize(("name", "settings"), TABLE)
def test_every_token_target_shows_its_row(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    x = tokens(batch, batch.logits)
    row = formulas.table_row(name, x, settings)
    assert row is not None
    target = qtarget.get_target(name, **settings)
    known = {role: r.flatten(tuple(batch.labels.shape)) for role, r in frozen_arguments(name, batch).items()}
    kept = batch.kept.flatten().nonzero()[:, 0]
    for i, at in list(enumerate(kept.tolist()))[::3]:
        one = {role: r.rows(slice(at, at + 1)) for role, r in known.items()}
        seen = qtarget.induced_target(
            lambda z, y, one=one: qtarget.target_loss(z, y, target, **one),
            x.z[i : i + 1],
            x.y[i : i + 1],
            residual=row.q[i : i + 1],
        )
        assert bool(seen.fits)
        p = torch.softmax(x.z[i], -1)
        a, b, c = row.a[i], row.b[i], row.c[i]
        one_hot = x.one_hot[i]
        induced = a * one_hot + b * row.q[i] + (1 - a - b) * p
        close(seen.target[0], p - c * (p - induced))
        if name == "gift" and settings["beta"] == 20.0:
            continue  # Q is all but the label itself: the two pulls cannot be told apart
        if float(x.p_y[i]) > 0.999:
            continue  # nor here, where p is: both pulls are within FIT_TOLERANCE of one direction
        if name == "target_sft" and settings["eta"] == 0.0:
            b = torch.zeros_like(b)  # the residual is the model itself: a pull that is not felt
        close(seen.label_weight[0], c * a, 1e-6)
        close(seen.residual_weight[0], c * b, 1e-6)


def test_losses_without_gradient_raise() -> None:
    with pytest.raises(ShapeError, match="does not depend on the logits"):
        qtarget.induced_target(lambda z, y: z.detach().sum(), LOGITS, LABELS)


def test_masked_labels_and_batches_are_refused_with_the_way_out() -> None:
    masked = LABELS.clone()
    masked[2] = -100
    with pytest.raises(ShapeError, match=r"label -100 is not in the vocabulary of 11.*keep = labels != -100"):
        qtarget.induced_target(F.cross_entropy, LOGITS, masked)
    keep = masked != -100
    close(qtarget.induced_target(F.cross_entropy, LOGITS[keep], masked[keep]).target, ONE_HOT[keep])
    with pytest.raises(ShapeError, match="label 11"):
        qtarget.induced_target(F.cross_entropy, LOGITS, torch.full_like(LABELS, 11))


def test_a_loss_that_writes_into_its_arguments_changes_nothing_outside() -> None:
    """Logits halved in place: the gradient is half that of cross entropy at half the logits."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.div_(2.0), y.clamp_(min=0))

    before, labels = LOGITS.clone(), LABELS.clone()
    seen = qtarget.induced_target(loss, LOGITS, LABELS)
    close(seen.gradient, (torch.softmax(LOGITS / 2, -1) - ONE_HOT) / 2)
    assert torch.equal(before, LOGITS) and torch.equal(labels, LABELS)


def test_bfloat16_logits_are_read_exactly() -> None:
    rounded = LOGITS.bfloat16()
    seen = qtarget.induced_target(F.cross_entropy, rounded, LABELS)
    close(seen.gradient, torch.softmax(rounded.double(), -1) - ONE_HOT)


def test_stop_gradients_are_respected() -> None:
    """``-sg(p) log p`` and ``p - 1`` in disguise (a straight-through value) teach what their gradients do."""

    def straight_through(z: Tensor, y: Tensor) -> Tensor:
        log_p = torch.log_softmax(z, -1)[0, y]
        return 7.0 + (log_p.exp() * -log_p).detach() - log_p.exp() + log_p.exp().detach()

    seen = qtarget.induced_target(straight_through, LOGITS, LABELS)
    close(seen.label_weight, P_Y)
    assert bool(seen.fits.all())


def test_a_loss_that_is_no_tensor_says_so() -> None:
    with pytest.raises(LossUnderLensError, match="returned float"):
        qtarget.induced_target(lambda z, y: float(F.cross_entropy(z, y).detach()), LOGITS, LABELS)
