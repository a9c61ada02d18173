"""Frozen models known on their top k and a tail: against the formula on grouped outcomes, and against full logits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.errors import IncompatibleError, MissingStatisticError, ShapeError
from qtarget.core.types import Needs
from tests.conformance import formulas
from tests.conformance.cases import VOCAB, Batch, frozen_arguments, make_batch, oracle_gradient, with_counted

SOFT = [
    pytest.param(name, settings, id="-".join([name, *(f"{k}={v}" for k, v in settings.items())]))
    for name in qtarget.available_targets()
    if formulas.FROZEN.get(name, ("", ""))[1] == "distribution"
    for settings in formulas.SETTINGS.get(name, [{}])
    if settings.get("temperature", 1.0) == 1.0
]
GROUPED = [case for case in SOFT if case.values[0] != "gift"]
"""gift mixes the uniform distribution into its anchor, so it has no formula on grouped outcomes; see its own test."""
ONCE = [c for c in GROUPED if c.values[1] == formulas.SETTINGS.get(str(c.values[0]), [{}])[0]]
"""Each method with its first settings, where the outcomes are tested and not the formula."""
DIVERGENCES = ["forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "taid"]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def top_k(batch: Batch, k: int, policy: str = "bucket", ids: Tensor | None = None) -> qtarget.Reference:
    """Top-k ids (or the given ones), their log-probs and the tail mass of the frozen model, by plain indexing."""
    log_probs = torch.log_softmax(batch.frozen, -1)
    if ids is None:
        ids = log_probs.argsort(-1, descending=True)[..., :k]
    listed = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, ids, True)
    return qtarget.Reference(
        label_log_probs=label_log_probs(batch),
        topk_ids=ids,
        topk_log_probs=log_probs.gather(-1, ids),
        tail_log_mass=log_probs.exp().masked_fill(listed, 0.0).sum(-1).log(),
        tail_policy=policy,  # pyright: ignore[reportArgumentType]
    )


def label_log_probs(batch: Batch) -> Tensor:
    """Of the frozen model."""
    return torch.log_softmax(batch.frozen, -1).gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]


def both_forms(name: str, settings: dict[str, Any], batch: Batch, known: Any) -> list[tuple[Tensor, Tensor]]:
    """Summed loss and gradient by the hidden states from ``target_loss`` and from ``linear_target_loss``."""
    known = with_counted(name, known, batch.labels)
    target, arguments = qtarget.get_target(name, **settings), {formulas.FROZEN[name][0]: known, "reduction": "sum"}
    out = []
    for chunk_size in (None, 5):
        hidden = batch.hidden.clone().requires_grad_()
        if chunk_size is None:
            loss = qtarget.target_loss(hidden @ batch.weight.T, batch.labels, target, **arguments)
        else:
            loss = qtarget.linear_target_loss(
                hidden, batch.weight, batch.labels, target, chunk_size=chunk_size, **arguments
            )
        loss.backward()
        out.append((loss.detach(), hidden.grad))
    return out


def grouped_tokens(batch: Batch, logits: Tensor, known: qtarget.Reference) -> formulas.Tokens:
    """The oracle's view: every listed token an outcome of its own, all others one more."""
    kept = batch.kept
    ids = known.topk_ids[kept]  # pyright: ignore[reportOptionalSubscript]
    groups = torch.full((len(ids), VOCAB), ids.shape[1])
    for i, row in enumerate(ids.tolist()):
        for j, token in enumerate(row):
            groups[i, token] = j
    listed = known.topk_log_probs[kept].exp()  # pyright: ignore[reportOptionalSubscript]
    frozen_groups = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)
    sequence = batch.sequence_ids()[kept]
    return formulas.Tokens(logits[kept], batch.labels[kept], batch.frozen[kept], sequence, groups, frozen_groups)


@pytest.mark.parametrize(("name", "settings"), GROUPED)
@pytest.mark.parametrize("k", [1, 5])
def test_bucket_is_the_formula_on_k_and_one_outcomes(name: str, settings: dict[str, Any], k: int) -> None:
    batch = make_batch()
    known = top_k(batch, k)
    assert bool((known.topk_ids == batch.labels[..., None]).any())  # pyright: ignore[reportAttributeAccessIssue]
    hidden = batch.hidden.clone().requires_grad_()
    x = grouped_tokens(batch, hidden @ batch.weight.T, known)
    expected = formulas.losses(name, x, settings).sum()
    (gradient,) = torch.autograd.grad(expected, hidden)
    for loss, ours in both_forms(name, settings, batch, known):
        close(loss, expected.detach())
        close(ours, gradient)


@pytest.mark.parametrize(
    ("name", "settings", "policy", "k"),
    [pytest.param(*c.values, "bucket", k, id=f"{c.id}-bucket-{k}") for c in SOFT for k in (VOCAB - 1, VOCAB)]
    + [pytest.param(*c.values, "spread", k, id=f"{c.id}-spread-{k}") for c in ONCE for k in (VOCAB - 1, VOCAB)],
)
def test_all_or_all_but_one_listed_equals_full(name: str, settings: dict[str, Any], policy: str, k: int) -> None:
    batch = make_batch()
    known = top_k(batch, k, policy)  # k = V has the tail mass 0: its log is minus infinity
    if k == VOCAB:
        assert bool((known.tail_log_mass == -torch.inf).all())  # pyright: ignore[reportAttributeAccessIssue]
    expected_loss, expected = oracle_gradient(name, settings, batch)
    for loss, ours in both_forms(name, settings, batch, known):
        close(loss, expected_loss)
        close(ours, expected @ batch.weight)


@pytest.mark.parametrize(("name", "settings"), GROUPED)
def test_spread_is_full_with_a_uniform_tail(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    known = top_k(batch, 6, "spread")
    frozen = torch.softmax(batch.frozen, -1)
    full = torch.zeros_like(frozen)
    for i, ids in enumerate(known.topk_ids.flatten(0, 1).tolist()):  # pyright: ignore[reportOptionalMemberAccess]
        row = frozen.flatten(0, 1)[i]
        left = 1 - sum(float(row[j]) for j in ids)
        for j in range(VOCAB):
            full.view(-1, VOCAB)[i, j] = row[j] if j in ids else left / (VOCAB - len(ids))
    batch = Batch(batch.hidden, batch.weight, batch.labels, full.log())
    known = replace(known, label_log_probs=label_log_probs(batch))
    expected_loss, expected = oracle_gradient(name, settings, batch)
    for loss, ours in both_forms(name, settings, batch, known):
        close(loss, expected_loss)
        close(ours, expected @ batch.weight)


FORWARD = [case for case in GROUPED if case.values[0] not in ("reverse_kl", "skew_reverse_kl", "generalized_jsd")]


@pytest.mark.parametrize(("name", "settings"), FORWARD)
def test_renormalize_is_full_with_the_tail_cut_off(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    known = top_k(batch, 6, "renormalize")
    kept = torch.zeros_like(batch.frozen).scatter(-1, known.topk_ids, 1.0)  # pyright: ignore[reportArgumentType]
    cut = torch.where(kept > 0, batch.frozen, -torch.inf)
    batch = Batch(batch.hidden, batch.weight, batch.labels, cut)
    known = replace(known, label_log_probs=label_log_probs(batch))
    expected_loss, expected = oracle_gradient(name, settings, batch)
    no_tail = replace(known, tail_log_mass=None)
    for given in (known, no_tail):
        for loss, ours in both_forms(name, settings, batch, given):
            if (
                settings.get("eta") != 0.0
            ):  # then the residual is the model itself, and its entropy that of k + 1 outcomes
                close(loss, expected_loss)
            close(ours, expected @ batch.weight)


def test_renormalize_inflates_the_optimum() -> None:
    """A renormalised teacher is imitated when the model is the cut and scaled-up teacher, not the teacher."""
    batch = make_batch()
    known = top_k(batch, 6, "renormalize")
    listed = torch.zeros_like(batch.frozen).scatter(-1, known.topk_ids, 1.0) > 0  # pyright: ignore[reportArgumentType]
    for logits, stationary in ((batch.frozen, False), (batch.frozen.masked_fill(~listed, -60.0), True)):
        leaf = logits.clone().requires_grad_()
        qtarget.target_loss(leaf, batch.labels, "distillation", teacher=known, reduction="sum").backward()
        assert (float(leaf.grad.abs().max()) < 1e-12) == stationary  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("reverse_kl", {}), ("generalized_jsd", {"beta": 1.0}), ("skew_reverse_kl", {"alpha": 0.0})],
)
def test_renormalize_refuses_reverse_divergences(name: str, settings: dict[str, Any]) -> None:
    batch = make_batch()
    with pytest.raises(IncompatibleError, match=r"renormalize.*use tail_policy 'bucket' or 'spread'"):
        both_forms(name, settings, batch, top_k(batch, 6, "renormalize"))


LINEAR = [c for c in ONCE if qtarget.get_target(str(c.values[0])).linear_in_frozen]


@pytest.mark.parametrize(("name", "settings"), LINEAR)
def test_one_draw_gives_the_full_gradient_on_average(name: str, settings: dict[str, Any]) -> None:
    """Each token of the vocabulary drawn once, weighted by its frozen probability: what linear in the frozen model means."""
    batch = make_batch()
    _, expected = oracle_gradient(name, settings, batch)
    target, role = qtarget.get_target(name, **settings), formulas.FROZEN[name][0]
    mean = torch.zeros_like(batch.frozen)
    for token, share in enumerate(torch.softmax(batch.frozen, -1).unbind(-1)):
        ids = torch.full((*batch.labels.shape, 1), token)
        known = qtarget.Reference(
            label_log_probs=label_log_probs(batch),
            topk_ids=ids,
            topk_log_probs=torch.zeros(ids.shape, dtype=torch.float64),
            tail_policy="sampled",
        )
        leaf = batch.logits.clone().requires_grad_()
        arguments = {role: with_counted(name, known, batch.labels), "reduction": "sum"}
        qtarget.target_loss(leaf, batch.labels, target, **arguments).backward()
        assert leaf.grad is not None
        mean += share[..., None] * leaf.grad
    close(mean, expected)


# -- labels, padding, duplicates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "settings"), ONCE)
@pytest.mark.parametrize("inside", [True, False])
def test_label_inside_or_outside_the_listed_ids(name: str, settings: dict[str, Any], inside: bool) -> None:
    batch = make_batch()
    shift = torch.arange(4) if inside else torch.arange(1, 5)
    ids = (batch.labels.clamp(min=0)[..., None] + 7 * shift) % VOCAB
    known = top_k(batch, 4, ids=ids)
    hidden = batch.hidden.clone().requires_grad_()
    x = grouped_tokens(batch, hidden @ batch.weight.T, known)
    expected = formulas.losses(name, x, settings).sum()
    (gradient,) = torch.autograd.grad(expected, hidden)
    for loss, ours in both_forms(name, settings, batch, known):
        close(loss, expected.detach())
        close(ours, gradient)


@pytest.mark.parametrize(("name", "settings"), ONCE)
@pytest.mark.parametrize("policy", ["bucket", "spread", "renormalize"])
def test_padded_and_duplicate_ids_change_nothing(name: str, settings: dict[str, Any], policy: str) -> None:
    batch = make_batch()
    if policy == "renormalize" and name not in {case.values[0] for case in FORWARD}:
        pytest.skip("refused or infinite under this policy")
    plain = top_k(batch, 5, policy)
    ids, log_probs = plain.topk_ids, plain.topk_log_probs
    assert ids is not None
    assert log_probs is not None
    pad = torch.full_like(ids[..., :1], -1)
    junk = torch.full_like(log_probs[..., :1], torch.nan)
    messy = qtarget.Reference(
        label_log_probs=plain.label_log_probs,
        topk_ids=torch.cat([pad, ids, ids[..., 2:4], pad], -1),
        topk_log_probs=torch.cat([junk, log_probs, log_probs[..., 2:4], junk], -1),
        tail_log_mass=plain.tail_log_mass,
        tail_policy=policy,  # pyright: ignore[reportArgumentType]
    )
    for (loss, ours), (expected_loss, expected) in zip(
        both_forms(name, settings, batch, messy), both_forms(name, settings, batch, plain), strict=True
    ):
        close(loss, expected_loss)
        close(ours, expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_ids_at_all_leave_one_outcome(name: str) -> None:
    """Tail mass one: model and teacher agree on the only outcome there is."""
    batch = make_batch()
    shape = (*batch.labels.shape, 2)
    nothing = qtarget.Reference(
        topk_ids=torch.full(shape, -1),
        topk_log_probs=torch.full(shape, -torch.inf, dtype=torch.float64),
        tail_log_mass=torch.zeros(batch.labels.shape, dtype=torch.float64),
    )
    for loss, ours in both_forms(name, {}, batch, nothing):
        assert abs(float(loss)) < 1e-12
        close(ours, torch.zeros_like(ours), 1e-12)


# -- the tail ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DIVERGENCES, "distillation"])
def test_mass_moved_outside_the_top_k_raises_the_loss(name: str) -> None:
    batch = make_batch()
    known = top_k(batch, 5)
    listed = torch.zeros_like(batch.frozen).scatter(-1, known.topk_ids, 1.0) > 0  # pyright: ignore[reportArgumentType]
    losses = []
    for push in (0.0, 0.5, 1.0, 2.0, 4.0):  # starting at the teacher, favour everything that it does not list
        moved = batch.frozen + push * ~listed
        losses.append(float(qtarget.target_loss(moved, batch.labels, name, teacher=known)))
    assert all(late > early + 1e-4 for early, late in pairwise(losses)), losses


@pytest.mark.parametrize("name", ["reverse_kl", "skew_reverse_kl"])
def test_no_tail_mass_at_all(name: str) -> None:
    """A teacher that leaves nothing outside its two tokens: reverse KL is infinite, its skewed form is not."""
    known = qtarget.Reference(
        topk_ids=torch.tensor([[0, 1]]),
        topk_log_probs=torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(),
        tail_log_mass=torch.tensor([-torch.inf], dtype=torch.float64),
    )
    logits = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)  # p = 1/3 each; the tail holds 1/3
    loss = qtarget.target_loss(logits, torch.tensor([0]), name, teacher=known)
    if name == "reverse_kl":
        assert float(loss) == torch.inf
    else:
        p, q, a = torch.tensor([1 / 3, 1 / 3, 1 / 3]), torch.tensor([0.5, 0.5, 0.0]), 0.1
        expected = (p * (p / (a * p + (1 - a) * q)).log()).sum()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [3, 20, None])
def test_a_model_at_its_teacher_loses_nothing(name: str, k: int | None) -> None:
    batch = make_batch()
    batch = Batch(batch.hidden, batch.weight, batch.labels, batch.logits)
    known = frozen_arguments(name, batch)["teacher"] if k is None else top_k(batch, k)
    for loss, ours in both_forms(name, {}, batch, known):
        assert abs(float(loss)) / int(batch.kept.sum()) < 1e-9
        assert float(ours.abs().max()) < 1e-9


NEAR = [
    case
    for case in SOFT
    if case.values[0] not in ("sft_kl", "asft", "consensus", "crossfit_consensus", "gift", "hybrid_distillation")
]


@pytest.mark.parametrize(("name", "settings"), NEAR)
@pytest.mark.parametrize("k", [6, None])
@pytest.mark.parametrize("mode", ["float32", "autocast"])
def test_float32_gradient_near_the_teacher(name: str, settings: dict[str, Any], k: int | None, mode: str) -> None:
    """Logit distance 0.01: relative gradient error below 1e-3; autocast must not round the logits to bfloat16."""
    if name == "target_sft" and settings["eta"] == 0.0:
        pytest.skip("no teacher left")
    far = make_batch()
    noise = torch.randn(far.frozen.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hidden, weight = far.hidden.float(), far.weight.float()
    exact = Batch(hidden.double(), weight.double(), far.labels, hidden.double() @ weight.double().T + 0.01 * noise)
    known = frozen_arguments(name, exact)[formulas.FROZEN[name][0]] if k is None else top_k(exact, k)
    hidden64 = exact.hidden.clone().requires_grad_()
    target, role = qtarget.get_target(name, **settings), formulas.FROZEN[name][0]
    qtarget.target_loss(hidden64 @ exact.weight.T, far.labels, target, reduction="sum", **{role: known}).backward()
    narrow = known.map_tensors(lambda _, v: v.float() if v.is_floating_point() else v)
    hidden32 = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss = qtarget.linear_target_loss(
            hidden32, weight, far.labels, target, chunk_size=5, reduction="sum", **{role: narrow}
        )
    loss.backward()
    assert hidden64.grad is not None
    assert hidden32.grad is not None
    error = (hidden32.grad.double() - hidden64.grad).norm() / hidden64.grad.norm()
    assert float(error) < (1e-3 if mode == "float32" else 1e-2)  # autocast still rounds the product back to hidden


# -- what cannot be ------------------------------------------------------------------------------------------------


def test_malformed_sparse_references_raise() -> None:
    batch = make_batch()
    good = top_k(batch, 4)
    ids, log_probs = good.topk_ids, good.topk_log_probs
    assert ids is not None
    assert log_probs is not None

    def loss(**fields: Any) -> None:
        known = qtarget.Reference(**{"topk_ids": ids, "topk_log_probs": log_probs, **fields})
        qtarget.target_loss(batch.logits, batch.labels, "forward_kl", teacher=known)

    with pytest.raises(MissingStatisticError, match=r"'forward_kl' needs teacher\.distribution"):
        loss()
    with pytest.raises(ShapeError, match="sum to one"):
        loss(tail_log_mass=torch.zeros_like(log_probs[..., 0]))
    with pytest.raises(ShapeError, match="vocabulary"):
        loss(topk_ids=ids + VOCAB, tail_log_mass=good.tail_log_mass)
    with pytest.raises(ShapeError, match="both or neither"):
        loss(topk_log_probs=None)
    with pytest.raises(ShapeError, match="equal"):
        loss(topk_ids=ids[..., 1:])
    target = qtarget.get_target("distillation", temperature=2.0)
    with pytest.raises(
        MissingStatisticError, match=r"'distillation' needs teacher\.log_probs.*no cache holds.*runs live"
    ):
        qtarget.target_loss(batch.logits, batch.labels, target, teacher=good)


def test_gift_on_a_bucket() -> None:
    """By hand: ``p_ref = (1/2 | 1/2 elsewhere)`` of 3, label the listed token, no smoothing, ``e^beta = 3``."""
    known = qtarget.Reference(
        label_log_probs=torch.tensor([0.5]).double().log(),
        topk_ids=torch.tensor([[0]]),
        topk_log_probs=torch.tensor([[0.5]]).double().log(),
        tail_log_mass=torch.tensor([0.5]).double().log(),
    )
    z = torch.tensor([[0.2, 0.5, -0.4]], dtype=torch.float64, requires_grad=True)
    target = qtarget.get_target("gift", beta=torch.tensor(3.0).double().log().item(), smoothing=0.0)
    loss = qtarget.target_loss(z, torch.tensor([0]), target, reference=known)
    loss.backward()
    p = torch.softmax(z.detach(), -1)[0]
    q = torch.tensor([0.75, 0.25]).double()  # 3/2 : 1/2
    expected = -(q[0] * p[0].log() + q[1] * (p[1] + p[2]).log())
    close(loss.detach(), expected)
    tail = q[1] * p[1:] / (p[1] + p[2])
    assert z.grad is not None
    close(z.grad[0], p - torch.cat([q[:1], tail]))


# -- token_statistics writes what the losses read ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["logits", "hidden"])
def test_token_statistics_against_brute_force(form: str) -> None:
    batch = make_batch()
    arguments: dict[str, Any] = {"logits": batch.logits}
    logits = batch.logits
    if form == "hidden":
        bias = torch.linspace(-1, 1, VOCAB, dtype=torch.float64)
        arguments = {"hidden": batch.hidden, "lm_head_weight": batch.weight, "bias": bias}
        arguments |= {"logit_scale": 0.7, "logit_softcap": 6.0, "chunk_size": 4}
        logits = 6.0 * torch.tanh(0.7 * (batch.logits + bias) / 6.0)
    stats = qtarget.token_statistics(labels=batch.labels, top_k=4, tail_policy="spread", **arguments)
    assert stats.tail_policy == "spread"
    p = torch.softmax(logits, -1)
    for i, j in (~batch.kept).nonzero().tolist():
        assert float(stats.label_log_probs[i, j]) == 0  # pyright: ignore[reportOptionalSubscript]
        assert stats.topk_ids[i, j].tolist() == [-1] * 4  # pyright: ignore[reportOptionalSubscript]
    for i, j in batch.kept.nonzero().tolist():
        row = sorted(enumerate(p[i, j].tolist()), key=lambda pair: -pair[1])
        got = {f: getattr(stats, f)[i, j] for f in ("label_log_probs", "entropy", "topk_log_probs", "tail_log_mass")}
        assert stats.topk_ids[i, j].tolist() == [token for token, _ in row[:4]]  # pyright: ignore[reportOptionalSubscript]
        close(got["label_log_probs"], p[i, j, batch.labels[i, j]].log())
        close(got["entropy"], -(p[i, j] * p[i, j].log()).sum())
        close(got["topk_log_probs"].exp(), torch.tensor([v for _, v in row[:4]], dtype=torch.float64))
        close(got["tail_log_mass"].exp(), torch.tensor(sum(v for _, v in row[4:]), dtype=torch.float64))


def test_soft_targets_ask_for_float32_logits() -> None:
    soft = {name for name in qtarget.available_targets() if qtarget.get_target(name).needs.soft}
    assert soft == {name for name, (_, kind) in formulas.FROZEN.items() if kind == "distribution"}
    assert not Needs(reference=frozenset({"label_log_probs"})).soft
