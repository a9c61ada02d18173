"""Each fault of training code, written down as a loss, is found; the same loss without it is not accused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtarget.report.lens.checks import run_checks
from qtarget.report.lens.document import look
from qtarget.report.lens.losses import callable_under_lens


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.flatten(0, -2), labels.flatten()


def per_token(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*flat(logits, labels), reduction="none").reshape(labels.shape)


def kept(labels: Tensor) -> Tensor:
    return (labels != -100).double()


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]


# -- good ones ---------------------------------------------------------------------------------------------------------


def sum_of_tokens(logits, labels):
    return per_token(logits, labels).sum()


def one_a_token(logits, labels):
    return per_token(logits, labels)


def mean_clamped(logits, labels, num_items_in_batch=None):
    count = kept(labels).sum() if num_items_in_batch is None else num_items_in_batch
    return per_token(logits, labels).sum() / torch.as_tensor(count).clamp(min=1)


def dft_sum(logits, labels):
    log_p = log_probs_of(logits, labels)
    return -(log_p.detach().exp() * log_p * kept(labels)).sum()


def kl_tokens(logits, teacher_logits, labels):
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return ((log_q.exp() * (log_q - log_p)).sum(-1) * kept(labels)).sum()


def tempered_kl(logits, teacher_logits, labels, temperature=2.0):
    return temperature**2 * kl_tokens(logits / temperature, teacher_logits / temperature, labels)


GOOD = [sum_of_tokens, one_a_token, mean_clamped, dft_sum, kl_tokens, tempered_kl]


@pytest.mark.parametrize("function", GOOD, ids=lambda f: f.__name__)
def test_good_losses_are_not_accused(function: Callable) -> None:
    checks, _ = run_checks(callable_under_lens(function, function.__name__))
    assert [c for c in checks if c["status"] in ("fault", "warn")] == []


# -- faults: name of the check, its status, a word of the finding ---------------------------------------------------------


def mean_over_all_positions(logits, labels):
    return per_token(logits, labels).mean()


def mean_over_padded_rows(logits, labels):
    return (per_token(logits, labels).sum(1) / labels.shape[1]).mean()


def mean_of_sequences(logits, labels):
    return (per_token(logits, labels).sum(-1) / kept(labels).sum(-1).clamp(min=1)).mean()


def mean_of_this_call(logits, labels):
    return per_token(logits, labels).sum() / kept(labels).sum().clamp(min=1)


def count_ignored(logits, labels, num_items_in_batch=None):
    return mean_of_this_call(logits, labels)


def torch_mean(logits, labels):
    return F.cross_entropy(*flat(logits, labels))


def early_return(logits, labels):
    if not (labels != -100).any():
        return torch.zeros(())
    return sum_of_tokens(logits, labels)


def masks_zero_instead(logits, labels):
    return -(log_probs_of(logits, labels) * (labels != 0)).sum()


def negative_index(logits, labels):
    log_p = logits.flatten(0, -2).log_softmax(-1)
    return -log_p[torch.arange(len(log_p)), labels.flatten()].sum()


def out_of_bounds(logits, labels):
    return -logits.log_softmax(-1).gather(-1, labels[..., None]).sum()


def weight_from_padding(logits, labels):
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).detach()
    return sum_of_tokens(logits, labels) * entropy.mean()


def weights_over_mean_of_all(logits, labels):
    weight = (1 - log_probs_of(logits, labels).detach().exp()) * kept(labels)
    return sum_of_tokens(logits, labels) / kept(labels).sum() / weight.mean()


def shifts_inside(logits, labels):
    return sum_of_tokens(logits[..., :-1, :], labels[..., 1:])


def shifts_twice(logits, labels):
    return sum_of_tokens(logits[..., :-2, :], labels[..., 2:])


def shifts_backwards(logits, labels):
    return sum_of_tokens(logits[..., 1:, :], labels[..., :-1])


def teacher_off_by_one(logits, teacher_logits, labels):
    return kl_tokens(logits, teacher_logits.roll(1, -2), labels)


def square_on_the_value(logits, teacher_logits, labels):
    loss = kl_tokens(logits / 2, teacher_logits / 2, labels)
    return loss + 3 * loss.detach()


def truncated_kl_clamped(logits, teacher_logits, labels):
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    top = log_q.topk(8, dim=-1)
    terms = top.values.exp() * (top.values - log_p.gather(-1, top.indices))
    return (terms.sum(-1).clamp(min=0) * kept(labels)).sum()


def probabilities_clamped(logits, labels):
    p_y = logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(p_y.clamp(min=1e-8).log() * kept(labels)).sum()


def log_of_softmax(logits, labels):
    return -(logits.softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].log() * kept(labels)).sum()


def both_sides_renormalised(logits, teacher_logits, labels):
    top = teacher_logits.topk(8, dim=-1)
    return kl_tokens(logits.gather(-1, top.indices), top.values, labels)


def writes_into_logits(logits, labels):
    logits.div_(2.0)
    return sum_of_tokens(logits, labels)


def writes_into_labels(logits, labels):
    mask = kept(labels)
    labels[labels == -100] = 0
    return (per_token(logits, labels) * mask).sum()


FAULTS = [
    (mean_over_all_positions, "denominator", "fault", "all positions"),
    (mean_over_padded_rows, "denominator", "fault", "all positions"),
    (weights_over_mean_of_all, "denominator", "fault", "beside 5 of them a token's gradient is 6 times"),
    (mean_of_sequences, "denominator", "warn", "averages sequences"),
    (mean_of_this_call, "micro-batches", "warn", "short micro-batches weigh too much"),
    (count_ignored, "micro-batches", "fault", "although it is given the count"),
    (torch_mean, "all masked", "fault", "has the loss nan"),
    (early_return, "all masked", "fault", "without a graph"),
    (masks_zero_instead, "masked tokens", "fault", "are trained on"),
    (negative_index, "masked tokens", "fault", "are trained on"),
    (out_of_bounds, "masked tokens", "fault", "breaks the loss"),
    (weight_from_padding, "masked tokens", "fault", "changes the gradient of the trained"),
    (shifts_inside, "label shift", "warn", "shifts inside"),
    (shifts_twice, "label shift", "fault", "logits at t -2"),
    (shifts_backwards, "label shift", "fault", "logits at t +1"),
    (teacher_off_by_one, "frozen model's place", "fault", "off by 1"),
    (square_on_the_value, "value and gradient", "fault", "scaled by 4"),
    (truncated_kl_clamped, "zero gradient", "warn", "exactly zero"),
    (probabilities_clamped, "zero gradient", "warn", "from 1e-12 to"),
    (log_of_softmax, "extreme logits", "fault", "log_softmax belongs"),
    (both_sides_renormalised, "unlikely tokens seen", "fault", "renormalised on both sides"),
    (writes_into_logits, "inputs unchanged", "warn", "logits in place"),
    (writes_into_labels, "inputs unchanged", "fault", "labels in place"),
]


@pytest.mark.parametrize(("function", "name", "status", "words"), FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_faults_are_found(function: Callable, name: str, status: str, words: str) -> None:
    checks, _ = run_checks(callable_under_lens(function, function.__name__))
    found = next(check for check in checks if check["name"] == name)
    assert (found["status"], words in found["finding"]) == (status, True), found


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (sum_of_tokens, "sum"),
        (one_a_token, "sum"),
        (mean_of_this_call, "mean over trained tokens"),
        (mean_over_all_positions, "mean over all positions"),
        (mean_of_sequences, "mean of sequence means"),
        (lambda logits, labels: per_token(logits, labels).sum() / len(labels), "sum over tokens, mean over rows"),
        (lambda logits, labels: sum_of_tokens(logits, labels) / kept(labels).sum() ** 0.5, "other"),
    ],
)
def test_scales_are_told_apart(function: Callable, kind: str) -> None:
    assert run_checks(callable_under_lens(function, "loss"))[1]["kind"] == kind


def test_a_shift_inside_does_not_change_what_is_seen() -> None:
    """The same loss, shifted inside and not: one form, one set of curves."""
    shifted, plain = (look(callable_under_lens(f, "loss")) for f in (shifts_inside, sum_of_tokens))
    assert shifted["called_with"]["shift"] == 1 and plain["called_with"]["shift"] == 0
    assert shifted["form"]["a"] == pytest.approx(plain["form"]["a"])
    assert shifted["curves"]["observed"] == pytest.approx(plain["curves"]["observed"])


def test_a_pull_on_the_level_of_all_logits_is_said() -> None:
    document = look(
        callable_under_lens(lambda z, y: F.cross_entropy(z, y) + 0.1 * z.logsumexp(-1).mean() ** 2, "z-loss")
    )
    assert not document["form"]["fits"] and not document["form"]["gradient_sums_to_zero"]
    assert any("does not sum to zero" in sentence for sentence in document["verdict"])
