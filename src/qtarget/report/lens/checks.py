"""Checks of a loss for the faults that are seen in training code: masks, denominators, parts of a batch, shifts, clamps.

Each check hands the loss small batches with a known answer, and says ``pass``, ``note`` (a property to know of), ``warn``
(right in some callers and wrong in others), ``fault``, or ``skip`` (has no meaning for this loss).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qtarget.core.errors import LossUnderLensError
from qtarget.report.lens.batches import ROWS, TIME, VOCAB, Batch, copies, ragged_batch, random_batch
from qtarget.report.lens.form import with_label_probs
from qtarget.report.lens.losses import IGNORE, Loss, gradient

TOLERANCE = 1e-3  # relative; losses that compute in float32 reach 1e-5
BLIND_MAX = 0.01  # share of the model's mass whose logits get no gradient

SCALES = {
    # of one token's gradient, against the token alone: with 5 more trained; with 5 masked; with 5 masked and a row of 6 trained
    "sum": (1.0, 1.0, 1.0),
    "mean over trained tokens": (1 / 6, 1.0, 1 / 7),
    "mean over all positions": (1 / 6, 1 / 6, 1 / 12),
    "mean of sequence means": (1 / 6, 1.0, 1 / 2),
    "sum of sequence means": (1 / 6, 1.0, 1.0),
    "sum over tokens, mean over rows": (1.0, 1.0, 1 / 2),
}
FINDINGS = {
    "sum": "It sums over tokens (or returns one value a token): masks and batch size do not scale it, its caller divides.",
    "mean over trained tokens": "It divides by the trained tokens of the call: masked tokens and padding do not scale it.",
    "mean over all positions": "It divides by all positions, masked ones too: a batch with more prompt or padding teaches less.",
    "mean of sequence means": "It averages sequences, not tokens: a token of a short answer weighs more than one of a long answer.",
    "sum of sequence means": "It sums the means of sequences: a token of a short answer weighs more, and batch size scales it.",
    "sum over tokens, mean over rows": "It divides by the rows of the call: masked tokens do not scale it.",
    "other": "Its scale follows none of the usual denominators.",
}


def finding(name: str, status: str, text: str, **evidence: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "finding": text, "evidence": evidence}


def run_checks(loss: Loss) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All checks, and the scale: ``{"kind", "finding", "one_token_of", "depends_on_other_tokens"}``."""
    scale = describe_scale(loss)
    checks = [check_denominator(loss, scale)]
    tests: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("masked tokens", lambda: check_masked(loss)),
        ("all masked", lambda: check_all_masked(loss)),
        ("micro-batches", lambda: check_micro_batches(loss, scale)),
        ("label shift", lambda: check_shift(loss)),
        ("frozen model's place", lambda: check_frozen_place(loss, scale)),
        ("value and gradient", lambda: check_value(loss, scale)),
        ("zero gradient", lambda: check_zero_gradient(loss)),
        ("extreme logits", lambda: check_extremes(loss)),
        ("unlikely tokens seen", lambda: check_blind(loss)),
        ("inputs unchanged", lambda: check_inputs(loss)),
    ]
    for name, test in tests:
        try:
            checks.append(test())
        except LossUnderLensError as error:
            checks.append(finding(name, "fault", f"It could not be evaluated: {error}"))
    return checks, scale


# -- denominators ------------------------------------------------------------------------------------------------------


def describe_scale(loss: Loss) -> dict[str, Any]:
    """How the gradient of one token depends on how many others there are, and on what they are."""
    alone = copies(1, 1).gradient(loss)[0, 0]

    def relative(batch: Batch) -> float | None:
        try:
            found = batch.gradient(loss)[0, 0]
        except LossUnderLensError:
            return None
        norm = float((alone * alone).sum())
        return float((found * alone).sum()) / norm if norm else None

    later = (torch.arange(TIME) > 0)[None]
    two_rows = torch.cat([later, torch.zeros_like(later)])
    ratios = {
        "with 5 more trained": relative(copies(1, TIME)),
        "with 5 masked": relative(copies(1, TIME).masked(later)),
        "with 5 masked and a row of 6 trained": relative(copies(2, TIME).masked(two_rows)),
        "in 6 rows of one": relative(copies(TIME, 1)),
    }
    seen = list(ratios.values())[:3]  # a ratio that could not be measured keeps its place: the others are no stand-in
    kind = "other"
    for name, expected in SCALES.items():
        if all(s is not None and abs(s - e) < TOLERANCE for s, e in zip(seen, expected)):
            kind = name
    text, masked = FINDINGS[kind], ratios["with 5 masked"]
    if masks_scale(kind, masked):
        text += f" Masked tokens scale it: beside 5 of them a token's gradient is {masked:.3g} times what it is alone."
    return {
        "kind": kind,
        "finding": text,
        "one_token_of": ratios,
        "depends_on_other_tokens": _depends_on_others(loss),
    }


def masks_scale(kind: str, with_masked: float | None) -> bool:
    """Whether masked tokens change a scale that has no name."""
    return kind == "other" and with_masked is not None and abs(with_masked - 1) > TOLERANCE


def _depends_on_others(loss: Loss) -> bool:
    """Whether the first tokens of four rows have another gradient when the rest becomes easy for the model."""
    batch, easy = random_batch(4), random_batch(4, seed=1, label_probs=(0.97, 0.99))
    for kept, other in zip(batch.tensors(), easy.tensors()):
        other[:, : TIME // 2] = kept[:, : TIME // 2]
    before, after = (b.gradient(loss)[:, : TIME // 2] for b in (batch, easy))
    return bool((before - after).norm() > TOLERANCE * torch.maximum(before.norm(), after.norm()))


def averages(scale: dict[str, Any]) -> bool:
    """Whether rows of one token must be multiplied by their number to compare with a token alone."""
    ratio = scale["one_token_of"]["in 6 rows of one"]
    return ratio is not None and ratio < 0.5


def check_denominator(loss: Loss, scale: dict[str, Any]) -> dict[str, Any]:
    status = {
        "mean over all positions": "fault",
        "mean of sequence means": "warn",
        "sum of sequence means": "warn",
        "sum over tokens, mean over rows": "warn",
        "other": "fault" if masks_scale(scale["kind"], scale["one_token_of"]["with 5 masked"]) else "warn",
    }.get(scale["kind"], "pass")
    if "labels" not in loss.takes:
        return finding(
            "denominator", "skip", "It takes no labels, so it cannot know which positions are masked; mask before."
        )
    text = scale["finding"]
    if scale["depends_on_other_tokens"]:
        text += " A token's weight also depends on the other tokens of the call."
    return finding("denominator", status, text, **scale["one_token_of"])


def check_micro_batches(loss: Loss, scale: dict[str, Any]) -> dict[str, Any]:
    """Eight ragged rows at once against one by one, put together as trainers do."""
    batch = ragged_batch()
    counts = (batch.labels != IGNORE).sum().item()
    num_items = int(counts) if "num_items" in loss.takes else None
    whole = batch.gradient(loss, num_items)
    rows = torch.cat([batch.part(slice(i, i + 1)).gradient(loss, num_items) for i in range(ROWS)])
    summed = num_items is not None or not averages(scale)
    error = float((rows / (1 if summed else ROWS) - whole).norm() / whole.norm().clamp(min=1e-300))
    evidence = {"relative_error": error, "num_items_given": num_items is not None}
    name, how = "micro-batches", "summed" if summed else "averaged"
    if error < TOLERANCE:
        return finding(
            name, "pass", f"Eight ragged rows one by one, {how}, have the gradient of the eight at once.", **evidence
        )
    text = f"Eight ragged rows one by one, {how}, miss the gradient of the eight at once by {100 * error:.0f} %"
    if scale["depends_on_other_tokens"]:
        return finding(name, "note", f"{text}: weights are made over the batch of one call.", **evidence)
    if num_items is not None:
        return finding(name, "fault", f"{text}, although it is given the count of the whole batch.", **evidence)
    return finding(
        name,
        "warn",
        f"{text}: short micro-batches weigh too much; divide a sum by the count of the whole batch.",
        **evidence,
    )


# -- masks and shifts --------------------------------------------------------------------------------------------------


def check_masked(loss: Loss) -> dict[str, Any]:
    """Masked positions get no gradient and have no say in that of others."""
    name = "masked tokens"
    if "labels" not in loss.takes:
        return finding(name, "skip", "It takes no labels.")
    batch = ragged_batch()
    masked = batch.labels == IGNORE
    try:
        found = batch.gradient(loss)
    except LossUnderLensError as error:
        return finding(name, "fault", f"A label of -100 is not ignored, it breaks the loss: {error.__cause__ or error}")
    if not bool(found.isfinite().all()):
        return finding(name, "fault", "A batch with masked labels has a gradient that is not finite.")
    share = float(found[masked].norm() / found.norm().clamp(min=1e-300))
    if share > 1e-9:
        text = f"Masked positions (label -100) are trained on: they have {100 * share:.0f} % of the gradient's norm."
        return finding(name, "fault", text, share=share)
    other = torch.where(masked[..., None], batch.logits.flip(-1) * 2, batch.logits)
    moved = Batch(other, batch.labels, batch.frozen).gradient(loss)
    change = float((moved - found)[~masked].norm() / found.norm().clamp(min=1e-300))
    if change > TOLERANCE:
        text = (
            f"What the model says at masked positions changes the gradient of the trained ones by {100 * change:.0f} %."
        )
        return finding(name, "fault", text, change=change)
    return finding(name, "pass", "Masked positions get no gradient and change no other's.", share=share, change=change)


def check_all_masked(loss: Loss) -> dict[str, Any]:
    """A micro-batch without a trained token: a finite zero that still has a graph."""
    name = "all masked"
    if "labels" not in loss.takes:
        return finding(name, "skip", "It takes no labels.")
    batch = random_batch(2).masked(torch.ones(2, TIME, dtype=torch.bool))
    leaf = batch.logits.clone().requires_grad_()
    try:
        value = loss(leaf.clone(), batch.labels, batch.frozen).sum()
    except LossUnderLensError as error:
        return finding(name, "fault", f"A batch in which everything is masked breaks it: {error.__cause__ or error}")
    if not bool(value.isfinite()):
        text = f"A batch in which everything is masked has the loss {float(value.detach())}: it poisons the step it is summed into."
        return finding(name, "fault", text)
    if not value.requires_grad:
        text = "A batch in which everything is masked has a loss without a graph: backward raises, and ranks wait for each other."
        return finding(name, "fault", text)
    (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
    if found is not None and not bool((found == 0).all()):
        return finding(name, "fault", "A batch in which everything is masked has a gradient that is not zero.")
    return finding(
        name, "pass", "A batch in which everything is masked has a finite loss, with a graph and no gradient."
    )


def check_shift(loss: Loss) -> dict[str, Any]:
    """Whether the loss moves the labels itself."""
    name = "label shift"
    if "labels" not in loss.takes:
        return finding(name, "skip", "It takes no labels.")
    if loss.shift == 0:
        return finding(name, "pass", "The label at a place is compared with the logits at that place.", shift=0)
    if loss.shift == 1:
        text = (
            "It shifts inside: the label at t is compared with the logits at t - 1 (transformers' convention). If its caller "
            "shifts too, every token is trained to predict the one after next. This page gives it unshifted labels."
        )
        return finding(name, "warn", text, shift=1)
    text = f"The label at t is compared with the logits at t {-loss.shift:+d}: no convention is like that."
    return finding(name, "fault", text, shift=loss.shift)


def check_frozen_place(loss: Loss, scale: dict[str, Any]) -> dict[str, Any]:
    """A change of the frozen model at one place must be felt at that place."""
    name = "frozen model's place"
    if "frozen" not in loss.takes:
        return finding(name, "skip", "It takes no frozen model's logits.")
    batch, at = random_batch(2), TIME // 2
    frozen = batch.frozen.clone()
    frozen[0, at] += 0.2 * batch.frozen[0, at].flip(-1)
    before, after = batch.gradient(loss)[0], Batch(batch.logits, batch.labels, frozen).gradient(loss)[0]
    if scale["depends_on_other_tokens"]:  # weights over the batch move every token; directions do not
        kept = (before.norm(dim=-1) > 0) & (after.norm(dim=-1) > 0)
        before, after = (torch.nn.functional.normalize(g, dim=-1) * kept[:, None] for g in (before, after))
    change = (after - before).norm(dim=-1)
    if float(change.max()) < 1e-9:
        return finding(
            name, "skip", "At the tokens tried the frozen model moves nothing, or only weights made over the batch."
        )
    place = int(change.argmax())
    if place != at:
        text = f"The frozen model's logits at t are used for the live logits at t {place - at:+d}: off by {abs(place - at)}."
        return finding(name, "fault", text, shift=place - at)
    return finding(name, "pass", "Frozen and live logits are compared at the same place.", shift=0)


# -- values, zeros, extremes -------------------------------------------------------------------------------------------


def check_value(loss: Loss, scale: dict[str, Any]) -> dict[str, Any]:
    """Finite differences of the value against the gradient: a constant factor between them is a scale put on one alone."""
    name = "value and gradient"
    batch = random_batch(1)
    found = batch.gradient(loss)[0]
    value = loss(batch.logits, batch.labels, batch.frozen)
    step = 1e-2 if value.dtype != torch.float64 else 1e-3
    noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ratios = []
    for at in range(TIME):
        length = found[at].norm()
        if float(length) < 1e-9:
            continue
        for direction in (found[at] / length, found[at] / length + 0.5 * noise / noise.norm()):
            moved = torch.zeros_like(batch.logits)
            moved[0, at] = step * direction
            up, down = (
                float(loss((batch.logits + s * moved), batch.labels, batch.frozen).detach().double().sum())
                for s in (1, -1)
            )
            ratios.append((up - down) / (2 * step) / float((found[at] * direction).sum()))
    if not ratios:
        return finding(name, "skip", "Its gradient is zero at the tokens tried.")
    low, high = min(ratios), max(ratios)
    evidence = {"smallest_ratio": low, "largest_ratio": high}
    if high - low > 2e-2 * max(abs(low), abs(high)) or (scale["depends_on_other_tokens"] and abs(low - 1) > 2e-2):
        text = "The gradient is not that of the value: something in it is held constant (stop-gradient), as in dft."
        return finding(name, "note", text, **evidence)
    if abs(low - 1) > 2e-2:
        text = f"The value is scaled by {(low + high) / 2:.4g} and the gradient is not (T^2 on one of them?)."
        return finding(name, "fault", text, **evidence)
    return finding(name, "pass", "The gradient is the derivative of the value.", **evidence)


def check_zero_gradient(loss: Loss) -> dict[str, Any]:
    """Tokens at which nothing is learnt at all: likely and unlikely ones, and such where the model outdoes the frozen one."""
    name = "zero gradient"
    rng = torch.Generator().manual_seed(5)
    frozen = 1.5 * torch.randn(80, 1, VOCAB, generator=rng, dtype=torch.float64)
    logits = 1.5 * torch.randn(64, 1, VOCAB, generator=rng, dtype=torch.float64)
    labels = torch.randint(VOCAB, (80, 1), generator=rng)
    wanted = 10 ** -torch.linspace(0.01, 12, 64, dtype=torch.float64)
    sharper = 1.5 * frozen[64:]  # a KL cut to the top k is negative there
    logits = torch.cat([with_label_probs(logits, labels[:64], wanted[:, None]), sharper])
    found = gradient(loss, logits, labels, frozen)[1][:, 0]
    dead = (found == 0).all(-1)
    if not bool(dead.any()):
        return finding(name, "pass", "Every token has a gradient, down to p_y = 1e-12.", share=0.0)
    share = float(dead.double().mean())
    at_dead = logits.log_softmax(-1).gather(-1, labels[..., None])[:, 0, 0].exp()[dead]
    low, high = float(at_dead.min()), float(at_dead.max())
    text = (
        f"The gradient is exactly zero at {100 * share:.0f} % of the tokens tried, p_y from {low:.2g} to {high:.2g}: meant in a "
        "target with a threshold, a fault where a clamp does it."
    )
    return finding(name, "warn", text, share=share, smallest_p_y=low, largest_p_y=high)


def check_extremes(loss: Loss) -> dict[str, Any]:
    """Float32 logits 200 apart, for and against the label."""
    name = "extreme logits"
    batch = random_batch(2, 2)
    logits = batch.logits.float()
    gap = torch.tensor([[200.0, -200.0]] * 2)[..., None]
    logits = logits.scatter(-1, batch.labels[..., None], gap)
    value, found = gradient(loss, logits, batch.labels, batch.frozen.float())
    if bool(value.isfinite()) and bool(found.isfinite().all()):
        return finding(name, "pass", "Finite in float32 with logits 200 apart.")
    text = "Not finite in float32 with logits 200 apart: a log of a softmax, where log_softmax belongs."
    return finding(name, "fault", text)


def check_blind(loss: Loss) -> dict[str, Any]:
    """Mass that the model moved to tokens which the frozen model finds unlikely must be felt."""
    name = "unlikely tokens seen"
    batch = random_batch(1, 2)
    logits = batch.logits - 1.5 * batch.frozen
    logits = logits.scatter(-1, batch.labels[..., None], logits.logsumexp(-1, keepdim=True))
    found = gradient(loss, logits, batch.labels, batch.frozen)[1]
    felt = found != 0
    if not bool(felt.any(-1).all()):
        return finding(name, "skip", "Its gradient is zero at the tokens tried.")
    share = float((logits.softmax(-1) * ~felt).sum(-1).mean())
    if share > BLIND_MAX:
        text = (
            f"{100 * share:.0f} % of the model's mass gets no gradient where it lies on tokens that the frozen model finds "
            "unlikely: a top-k renormalised on both sides is blind there."
        )
        return finding(name, "fault", text, share=share)
    return finding(name, "pass", "Every logit with mass on it gets a gradient.", share=share)


def check_inputs(loss: Loss) -> dict[str, Any]:
    """The caller's tensors are left as they are."""
    name = "inputs unchanged"
    for batch in (ragged_batch(), random_batch()):  # a loss that cannot take a mask is looked at without one
        logits, labels, frozen = (tensor.clone() for tensor in batch.tensors())
        try:
            loss(logits, labels, frozen)
        except LossUnderLensError:
            continue
        given = zip(("logits", "labels", "frozen logits"), (logits, labels, frozen), batch.tensors())
        changed = [what for what, after, before in given if not torch.equal(after, before)]
        if changed:
            text = f"It changes its caller's {' and '.join(changed)} in place: whoever reads them next gets something else."
            status = "warn" if changed == ["logits"] else "fault"  # fused kernels keep the gradient there, on purpose
            return finding(name, status, text, changed=changed)
    return finding(name, "pass", "Logits and labels are as they were after the call.")
