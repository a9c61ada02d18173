"""Hand values and identities between methods (objectives.md, "Notes that tests must hold")."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qtarget
from qtarget.core.errors import HyperparameterError, IncompatibleError, UnknownTargetError
from qtarget.targets.taid import next_interpolation

Z = torch.tensor([[1.2, 0.3, -0.5, 2.0, -1.0, 0.1]], dtype=torch.float64)
Z_TEACHER = torch.tensor([[0.2, 1.5, -0.7, 1.0, 0.4, -2.0]], dtype=torch.float64)
Y = torch.tensor([1])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradient_of(name: str, z: Tensor = Z, y: Tensor = Y, **settings: Any) -> Tensor:
    """Logit gradient of a target whose frozen model, where it needs one, is ``Z_TEACHER``."""
    target = qtarget.get_target(name, **settings)
    frozen = qtarget.Reference.from_logits(Z_TEACHER, y)
    leaf = z.clone().requires_grad_()
    loss = qtarget.target_loss(leaf, y, target, reference=frozen, teacher=frozen, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


# -- hand values ---------------------------------------------------------------------------------------------------


def test_target_sft_vector() -> None:
    """The published test vector: p_y, the loss, Q and g."""
    target = qtarget.get_target("target_sft", eta=0.3)
    leaf = Z.clone().requires_grad_()
    loss, report = qtarget.target_loss(leaf, Y, target, teacher_logits=Z_TEACHER, return_report=True)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.5514188, abs=5e-8)
    assert float(report.label_weights) == pytest.approx(0.0954732, abs=5e-8)  # p_y
    g = torch.tensor([[0.0428374, -0.1510237, -0.0016879, 0.0953364, -0.0176844, 0.0322222]], dtype=torch.float64)
    q = torch.tensor([[0.1919888, 0.2464970, 0.0445868, 0.4272789, 0.0437039, 0.0459446]], dtype=torch.float64)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, g, rtol=0, atol=6e-8)
    torch.testing.assert_close(Z.softmax(-1) - leaf.grad, q, rtol=0, atol=6e-8)


def test_sft_and_dft_of_two_tokens() -> None:
    """p = (3/4, 1/4), label 0: losses log(4/3) and 3/4 log(4/3), gradients (-1/4, 1/4) and 3/4 of it."""
    z = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([0])
    for name, scale in (("sft", 1.0), ("dft", 0.75)):
        assert float(qtarget.target_loss(z, y, name)) == pytest.approx(scale * math.log(4 / 3), rel=1e-12)
        close(gradient_of_two(name, z, y), scale * torch.tensor([[-0.25, 0.25]], dtype=torch.float64))


def gradient_of_two(name: str, z: Tensor, y: Tensor) -> Tensor:
    leaf = z.clone().requires_grad_()
    return torch.autograd.grad(qtarget.target_loss(leaf, y, name), leaf)[0]


# -- identities ----------------------------------------------------------------------------------------------------


def test_gem_gradient_is_q_minus_label() -> None:
    q = torch.softmax(Z / 0.7, -1)
    close(gradient_of("gem", temperature=0.7), q - F.one_hot(Y, 6))
    h = torch.sigmoid(0.01 * (Z - Z[:, 1:2]))
    close(gradient_of("gem", form="logsigmoid"), q * h - (q * h).sum() * F.one_hot(Y, 6))


def test_gems_induced_target_leaves_the_simplex() -> None:
    p, q = torch.softmax(Z, -1), torch.softmax(Z / 0.7, -1)
    target = qtarget.get_target("gem")
    seen = qtarget.induced_target(lambda z, y: qtarget.target_loss(z, y, target), Z, Y)
    close(seen.target, p + F.one_hot(Y, 6) - q)
    assert float(seen.target.min()) < 0
    assert not bool(seen.in_simplex)


def test_p_power_between_sft_and_dft() -> None:
    close(gradient_of("p_power", alpha=1.0), gradient_of("dft"))
    close(gradient_of("p_power", alpha=0.0), gradient_of("sft"))
    close(gradient_of("p_power", alpha=1e-9), gradient_of("sft"), 1e-8)
    nll = F.cross_entropy(Z, Y)
    close(qtarget.target_loss(Z, Y, qtarget.get_target("p_power", alpha=1e-9)), nll, 1e-8)
    close(qtarget.target_loss(Z, Y, qtarget.get_target("p_power", alpha=0.0)), nll)


def test_psft_at_ratio_one_is_sft_and_above_the_clip_nothing() -> None:
    def gradient(old_log_prob: Tensor) -> Tensor:
        old = qtarget.Reference(label_log_probs=old_log_prob)
        leaf = Z.clone().requires_grad_()
        return torch.autograd.grad(qtarget.target_loss(leaf, Y, "psft", reference=old), leaf)[0]

    live = torch.log_softmax(Z, -1)[:, 1]
    close(gradient(live), gradient_of("sft"))
    close(gradient(live + 5), math.exp(-5) * gradient_of("sft"))  # no lower clip: the advantage is one
    close(gradient(live - math.log(1.29)), torch.zeros_like(Z))
    close(gradient(live - math.log(1.27)), 1.27 * gradient_of("sft"))


def test_psft_survives_a_ratio_that_overflows() -> None:
    old = qtarget.Reference(label_log_probs=torch.tensor([-200.0]))  # e^200 is infinite in float32
    leaf = Z.float().requires_grad_()
    loss = qtarget.target_loss(leaf, Y, "psft", reference=old)
    assert float(loss.detach()) == pytest.approx(-1.28)
    assert bool((torch.autograd.grad(loss, leaf)[0] == 0).all())


def test_target_sft_at_its_ends() -> None:
    p, t = torch.softmax(Z, -1), torch.softmax(Z_TEACHER, -1)
    p_y, one_hot = p[0, 1], F.one_hot(Y, 6)
    close(gradient_of("target_sft", eta=0.0), gradient_of("dft"))
    close(gradient_of("target_sft", eta=1.0), p - (p_y * one_hot + (1 - p_y) * t))  # p_y-hybrid distillation
    share = 1 - float(p_y)
    close(gradient_of("target_sft", eta=1.0), gradient_of("hybrid_distillation", teacher_weight=share))


def test_target_sft_at_small_eta_adds_reverse_kl() -> None:
    """``g ~ g_DFT + eta (1 - p_y) grad KL(p || p_T)``: the remainder is of second order in eta."""
    leaf = Z.clone().requires_grad_()
    p = torch.softmax(leaf, -1)
    reverse = (p * (torch.log_softmax(leaf, -1) - torch.log_softmax(Z_TEACHER, -1))).sum()
    (push,) = torch.autograd.grad(reverse, leaf)
    p_y = torch.softmax(Z, -1)[0, 1]
    remainders = []
    for eta in (1e-2, 1e-3, 1e-4):
        first_order = gradient_of("dft") + eta * (1 - p_y) * push
        remainders.append(float((gradient_of("target_sft", eta=eta) - first_order).norm()))
        assert remainders[-1] < 2 * eta**2
    assert remainders[0] / remainders[1] == pytest.approx(100, rel=0.1)


def test_generalized_jsd_at_its_ends() -> None:
    def value(name: str, **settings: Any) -> float:
        return float(qtarget.target_loss(Z, Y, qtarget.get_target(name, **settings), teacher_logits=Z_TEACHER))

    t, s = torch.softmax(Z_TEACHER, -1), torch.softmax(Z, -1)
    forward, reverse = float((t * (t / s).log()).sum()), float((s * (s / t).log()).sum())
    assert abs(forward - reverse) > 0.1
    assert value("generalized_jsd", beta=0.0) == pytest.approx(forward, rel=1e-12)
    assert value("generalized_jsd", beta=1.0) == pytest.approx(reverse, rel=1e-12)
    assert value("generalized_jsd", beta=1e-6) / 1e-6 == pytest.approx(forward, rel=1e-4)
    assert value("generalized_jsd", beta=1 - 1e-6) / 1e-6 == pytest.approx(reverse, rel=1e-4)
    assert value("forward_kl") == pytest.approx(forward, rel=1e-12)
    assert value("reverse_kl") == pytest.approx(reverse, rel=1e-12)
    for beta in (0.1, 0.5, 0.9):  # bounded by the entropy of the coin that chooses between teacher and model
        assert 0 < value("generalized_jsd", beta=beta) < -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    m = (s + t) / 2
    symmetric = float((t * (t / m).log()).sum() + (s * (s / m).log()).sum()) / 2
    assert value("generalized_jsd", beta=0.5) == pytest.approx(symmetric, rel=1e-12)


def test_closed_form_gradients_of_the_divergences() -> None:
    p, t = torch.softmax(Z, -1), torch.softmax(Z_TEACHER, -1)
    ratio = (p / t).log()
    close(gradient_of("reverse_kl"), p * (ratio - (p * ratio).sum()))
    close(gradient_of("forward_kl"), p - t)
    m = 0.1 * t + 0.9 * p
    u = 0.9 * t * p / m
    close(gradient_of("skew_kl", alpha=0.1), -(u - p * u.sum()))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tempered_distillation_by_finite_differences(temperature: float) -> None:
    """T squared scales value and gradient alike."""
    target = qtarget.get_target("distillation", temperature=temperature)
    step = 1e-5

    def value(z: Tensor) -> float:
        return float(qtarget.target_loss(z, Y, target, teacher_logits=Z_TEACHER))

    slopes = [
        (value(Z + step * e) - value(Z - step * e)) / (2 * step) for e in torch.eye(6, dtype=torch.float64)[:, None]
    ]
    close(gradient_of("distillation", temperature=temperature)[0], torch.tensor(slopes, dtype=torch.float64), 1e-8)
    q, p = torch.softmax(Z_TEACHER / temperature, -1), torch.softmax(Z / temperature, -1)
    assert value(Z) == pytest.approx(float(-(temperature**2) * (q * p.log()).sum()), rel=1e-12)
    close(gradient_of("distillation", temperature=temperature), temperature * (p - q))


def test_talr_median_of_sequence_means() -> None:
    """Sequences with mean nll 1, 2 and 6: tau is 2; the floor holds for the last token (e^-4 < 0.05)."""
    log_probs = torch.tensor([[-0.5, -1.5], [-2.0, -2.0], [-4.0, -8.0]], dtype=torch.float64)
    ours = qtarget.label_weights(qtarget.get_target("talr", min_weight=0.05), log_probs)
    expected = [[math.exp(-0.25), math.exp(-0.75)], [math.exp(-1), math.exp(-1)], [math.exp(-2), 0.05]]
    close(ours, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fraction", "tokens", "kept"), [(0.28, 25, 7), (0.6, 5, 3), (0.55, 100, 55), (0.1, 3, 1), (1, 4, 4)]
)
def test_the_share_of_kept_tokens_is_exact(fraction: float, tokens: int, kept: int) -> None:
    """0.28 x 25 is 7.000000000000001 in floating point, and still seven tokens."""
    scores = torch.linspace(0, 1, tokens)
    reference = qtarget.Reference(label_log_probs=torch.zeros(1, tokens))
    weights = qtarget.label_weights(
        qtarget.get_target("rho1", keep_fraction=fraction), -scores[None], reference=reference
    )
    assert weights[0].tolist() == [0.0] * (tokens - kept) + [1.0] * kept


def test_eaft_with_fewer_live_tokens_than_top_k() -> None:
    """Four of six tokens banned: the entropy of the two left (0 log 0 = 0) over log 6."""
    z = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]], dtype=torch.float64)
    loss = qtarget.target_loss(z, torch.tensor([0]), qtarget.get_target("eaft", top_k=6))
    assert float(loss) == pytest.approx(math.log(2) / math.log(6) * math.log(2), rel=1e-12)


# -- taid's schedule -----------------------------------------------------------------------------------------------


@given(
    t=st.floats(0.4, 1.0),
    momentum=st.floats(-5, 5),
    loss=st.floats(0, 1e6),
    previous=st.floats(0, 1e6),
    progress=st.floats(0, 1),
)
def test_taid_schedule_properties(t: float, momentum: float, loss: float, previous: float, progress: float) -> None:
    new, new_momentum = next_interpolation(t, momentum, loss, previous, progress)
    assert t <= new <= 1.0 or new == pytest.approx(t)
    assert new >= min(1.0, 0.4 + 0.6 * progress) - 1e-12  # never slower than linear
    assert new <= max(0.4 + 0.6 * progress, t + 5e-4 * (1 - t)) + 1e-12  # one bounded step
    better = next_interpolation(t, momentum, loss / 2, previous, progress)
    assert better[0] >= new
    assert better[1] >= new_momentum


def test_taid_schedule_by_hand() -> None:
    """The loss halves: momentum 0.01 x 0.5, and a step of 5e-4 sigmoid(0.005) 0.6."""
    new, momentum = next_interpolation(0.4, 0.0, 1.0, 2.0, 0.0)
    assert momentum == pytest.approx(0.005)
    assert new == pytest.approx(0.4 + 5e-4 / (1 + math.exp(-0.005)) * 0.6, rel=1e-12)
    assert next_interpolation(0.4, 0.0, 1.0, 2.0, 0.5)[0] == pytest.approx(0.7)
    assert next_interpolation(0.9, 0.0, 1.0, 2.0, 1.0)[0] == 1.0


def test_taid_schedule_survives_a_first_loss_of_zero() -> None:
    new, momentum = next_interpolation(0.4, 0.0, 1.0, 0.0, 0.0)  # relative change minus 1e15
    assert new == pytest.approx(0.4)
    assert momentum == pytest.approx(-1e13)


# -- combinations --------------------------------------------------------------------------------------------------

FROZEN = qtarget.Reference.from_logits(Z_TEACHER, Y)


def combined_gradient(name: str, **settings: Any) -> Tensor:
    return gradient_of(name, **settings)


def test_dft_and_sft_kl_make_asft() -> None:
    close(combined_gradient("dft+sft_kl", kl_weight=0.05), gradient_of("asft", kl_weight=0.05))
    frozen = {"reference": FROZEN}
    ours = qtarget.target_loss(Z, Y, qtarget.get_target("dft+sft_kl", kl_weight=0.05), **frozen)
    close(ours, qtarget.target_loss(Z, Y, qtarget.get_target("asft", kl_weight=0.05), **frozen))


def test_a_weight_scales_the_label_term_and_leaves_the_residual() -> None:
    """``prior_surprise+label_smoothing``: w (1-l) to the label, l to the uniform distribution."""
    p, w, smoothing = torch.softmax(Z, -1), 1 - torch.softmax(Z_TEACHER, -1)[0, 1], 0.2
    a, b = w * (1 - smoothing), smoothing
    expected = (a + b) * p - a * F.one_hot(Y, 6) - b / 6
    close(combined_gradient("prior_surprise+label_smoothing", smoothing=smoothing), expected)
    hidden = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    head = torch.eye(6, dtype=torch.float64)
    target = qtarget.get_target("prior_surprise+label_smoothing", smoothing=smoothing)
    loss = qtarget.linear_target_loss(hidden, head, Y, target, reference=FROZEN)
    p = torch.softmax(hidden.detach(), -1)
    close(torch.autograd.grad(loss, hidden)[0], (a + b) * p - a * F.one_hot(Y, 6) - b / 6)


def test_weights_multiply() -> None:
    p_y = torch.softmax(Z, -1)[0, 1]
    close(combined_gradient("dft+dft"), p_y * gradient_of("dft"))
    close(combined_gradient("psft+dft"), float(p_y / FROZEN_Y) * gradient_of("dft"))


FROZEN_Y = torch.softmax(Z_TEACHER, -1)[0, 1]


def test_a_batch_weight_on_a_base() -> None:
    log_probs = torch.log_softmax(Z, -1)
    z, y = Z.repeat(2, 1)[:, None], torch.tensor([[1], [2]])
    target = qtarget.get_target("talr+label_smoothing", smoothing=0.5, min_weight=0.0)
    assert target.scope == "batch"
    ours = qtarget.target_loss(z, y, target, reduction="sum")
    nll = -log_probs[0, [1, 2]]
    tau = nll.min()  # the lower median of two sequences of one token
    uniform = -log_probs.mean()
    close(ours, (torch.exp(-nll / tau) * 0.5 * nll).sum() + 2 * 0.5 * uniform)
    weights = qtarget.label_weights(target, -nll[:, None])
    close(weights[:, 0], torch.exp(-nll / tau))
    close(qtarget.target_loss(z, y, target, label_weights=weights, reduction="sum"), ours)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("sft_kl+sft", "residual"),
        ("gem+sft", "residual"),
        ("distillation+sft", "residual"),
        ("dft+distillation", "observed token"),
        ("dft+reverse_kl", "observed token"),
        ("talr+rho1", "only one part"),
        ("dft+talr", "put the batch-scope weight first: talr\\+dft"),
        ("label_smoothing+iw_sft", "residual"),
    ],
)
def test_combinations_without_meaning_raise(name: str, why: str) -> None:
    with pytest.raises(IncompatibleError, match=why):
        qtarget.get_target(name)


def test_combined_needs_are_those_of_both() -> None:
    needs = qtarget.get_target("prior_surprise+target_sft").needs
    assert needs.reference == {"label_log_probs"}
    assert needs.teacher == {"distribution"}
    assert qtarget.get_target("eaft+idft").needs.top_k == 20
    assert qtarget.get_target("eaft+idft").needs.entropy


# -- names and hyper-parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"), [("labelsmoothing", "label_smoothing"), ("taid2", "taid"), ("reverse-kl", "reverse_kl")]
)
def test_unknown_names_suggest_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownTargetError, match=f"'{name}' is unknown; did you mean .*{near}.*qtarget targets"):
        qtarget.get_target(name)
    with pytest.raises(LookupError):
        qtarget.get_target(name)


@pytest.mark.parametrize("name", [None, qtarget.get_target, qtarget.get_target("sft")])
def test_what_is_no_name_is_told_to_be_named(name: Any) -> None:
    with pytest.raises(UnknownTargetError, match=r"expected its name: .* 'module:Class' with target_kwargs"):
        qtarget.get_target(name)


@pytest.mark.parametrize(
    "name", ["", "+", "dft+", "dft+sft+sft", "nowhere:Class", ":Class", "qtarget:Nothing", "math:pi"]
)
def test_malformed_names_raise(name: str) -> None:
    with pytest.raises(UnknownTargetError):
        qtarget.get_target(name)


@pytest.mark.parametrize("name", ["qtarget:Reference", "qtarget:Target", "qtarget.core.types:LabelWeight"])
def test_classes_that_are_no_targets_raise(name: str) -> None:
    with pytest.raises(UnknownTargetError, match=r"not a.*subclass"):
        qtarget.get_target(name)


def test_an_outside_class_by_its_path() -> None:
    outside = qtarget.get_target("qtarget.targets.p_power:PPower", alpha=0.25)
    assert outside == qtarget.get_target("p_power", alpha=0.25)
    both = qtarget.get_target("qtarget.targets.dft:DFT+sft_kl", kl_weight=0.3)
    assert both == qtarget.get_target("dft+sft_kl", kl_weight=0.3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("p_power", {"alhpa": 1}, "did you mean alpha"),
        ("dft", {"alpha": 1}, "known: none"),
        ("asft", {"kl_weight": -1}, r"asft: kl_weight=-1; expected a number in \[0, inf\]"),
        ("target_sft", {"eta": 1.5}, "eta=1.5"),
        ("distillation", {"temperature": 0}, "temperature=0"),
        ("distillation", {"temperature": math.nan}, "temperature=nan"),
        ("p_power", {"alpha": True}, "alpha=True"),
        ("gem", {"form": "quadratic"}, "expected one of linear, logsigmoid"),
        ("skew_kl", {"alpha": 1.0}, "alpha=1.0"),
        ("rho1", {"keep_fraction": 0}, "keep_fraction=0"),
        ("eaft", {"top_k": 1}, "top_k=1"),
        ("eaft+p_power", {"alpha": 1}, "belongs to both parts"),
    ],
)
def test_bad_hyperparameters_raise(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperparameterError, match=message):
        qtarget.get_target(name, **settings)


def test_top_k_beyond_the_vocabulary() -> None:
    with pytest.raises(HyperparameterError, match="top_k=20 exceeds the vocabulary of 6"):
        qtarget.target_loss(Z, Y, "eaft")
    with pytest.raises(HyperparameterError, match="top_k=7"):
        qtarget.token_statistics(Z, Y, top_k=7)
