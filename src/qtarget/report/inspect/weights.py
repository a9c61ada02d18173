"""What each target would do at each token, from a model's listed numbers alone.

Everything goes through the machinery of training: the listed tokens, the label and one *rest* are a small vocabulary of
their own, on which ``token_view``, ``differentiate`` and ``logit_gradient`` compute as they do on a whole one. Where the
rest moves as one (every label weight, every anchor at its own start) the numbers are exact; elsewhere the rest is one
bucket, as it is for the loss with a cached teacher. A target that needs more is named, with the reason, and not shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from qtarget.api import label_weights
from qtarget.command import crossfit_command
from qtarget.core.coefficients import differentiate, logit_gradient
from qtarget.core.outcomes import ABSENT
from qtarget.core.shapes import Bool, Float, Int, Tensor
from qtarget.core.statistics import check_frozen, token_view
from qtarget.core.types import WITNESS_FIELDS, Needs, Reference, Target, TokenView, WeightsScale
from qtarget.report.tokens import ModelNumbers, TokenRows

CHUNK = 2**16
"""Tokens at once; a few dozen floats each."""
SAME_Q = 1e-3
"""Probability below which ``Q`` counts as ``(1 - a) p + a d_y``, which a page can work out from ``a`` alone."""


@dataclass(frozen=True)
class TargetNumbers:
    """One target at every trained token.

    Attributes:
        name: with its hyper-parameters.
        label_weights: ``[trained]`` ``a``, the weight of the pull towards the observed token; the data's own weights
            are in it.
        residual_weights: ``[trained]`` ``b``.
        moved: ``[trained]`` probability mass that one unit step of the logits' gradient asks to move,
            ``1/2 |p - Q|_1`` on the listed outcomes: the size of the token's gradient.
        q: ``[trained, shown + 1]`` ``Q`` at the first listed tokens and, last, at the label, where it is not simply
            ``(1 - a) p + a d_y``; else None. NaN at a token that some model does not list: it is in the rest.
    """

    name: str
    label_weights: np.ndarray
    residual_weights: np.ndarray
    moved: np.ndarray
    q: np.ndarray | None = None


@dataclass(frozen=True)
class Outcomes:
    """A live and frozen models on the outcomes that all list: k slots, the label, the rest.

    Attributes:
        live: ``[tokens, k + 2]`` log-probs that sum to one; slots that some model does not list are in the rest.
        label: ``[tokens]`` the label's slot: among the k where listed, else k.
        frozen: of each role.
    """

    live: Float[Tensor, "tokens k_2"]
    label: Int[Tensor, " tokens"]
    frozen: dict[str, Float[Tensor, "tokens k_2"]]


def unavailable(target: Target, live: ModelNumbers, frozen: dict[str, ModelNumbers]) -> str | None:
    """Why a target cannot be shown from listed numbers, or None if it can."""
    needs = target.needs
    if needs.log_probs:
        return "reads the live model's whole distribution, of which listed numbers hold the top alone"
    if needs.top_k > live.top_k:
        return (
            f"reads the top {needs.top_k} log-probs, {live.name} lists {live.top_k}: score with --top_k {needs.top_k}"
        )
    for role in ("reference", "teacher"):
        wanted = getattr(needs, role)
        if wanted and role not in frozen:
            return f"needs a {role}: set {role}_cache, or {role}_model_name_or_path"
        if wanted & set(WITNESS_FIELDS) and frozen[role].crossfit is None:
            return f"asks a cross-fit: {crossfit_command()}"
        if "log_probs" in wanted:
            return f"reads the {role}'s whole distribution, of which listed numbers hold the top alone"
        if "distribution" in wanted and not (frozen[role].top_k and live.top_k):
            return f"compares distributions: score the base and the {role} with --top_k 20"
    return None


def target_numbers(
    target: Target,
    rows: TokenRows,
    live: ModelNumbers,
    frozen: dict[str, ModelNumbers],
    *,
    name: str | None = None,
    shown: int = 5,
) -> TargetNumbers:
    """Weights, gradient size and ``Q`` at every trained token.

    A target that looks at a whole batch sees all rows as one batch.

    Args:
        target: one for which ``unavailable`` is None.
        rows: the tokens.
        live: the model as it is now; at the start of training, the base.
        frozen: numbers of the ``reference`` and of the ``teacher``, where there are any.
        shown: how many listed tokens ``q`` covers.

    Raises:
        MissingStatisticError: a frozen model lacks what the target needs.
    """
    frozen = {role: known.with_counted(rows, getattr(target.needs, role)) for role, known in frozen.items()}
    batch = _batch_weights(target, rows, live, frozen)
    pointwise = not target.has_residual and not target.needs.soft  # then the label and the rest say everything
    labels = torch.from_numpy(rows.labels)
    given = None if rows.loss_weights is None else torch.from_numpy(rows.loss_weights)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        compared = {role: frozen[role] for role in frozen if "distribution" in getattr(target.needs, role)}
        listed = live.reference(part)
        listed = replace(listed, topk_ids=None, topk_log_probs=None) if pointwise else listed
        outcomes = shared_outcomes(labels[part], listed, _references(compared, part))
        weights = None if batch is None else batch[part]
        parts.append(_chunk(target, outcomes, live, frozen, part, weights, (given, rows.weights_scale), shown))
    a, b, moved, q, plain = (torch.cat([p[i] for p in parts]).numpy() for i in range(5))
    simple = not len(q) or not np.nanmax(np.abs(q - plain)) >= SAME_Q
    return TargetNumbers(name or target.name, a, b, moved, None if simple else q)


def _references(frozen: dict[str, ModelNumbers], part: slice) -> dict[str, Reference]:
    return {role: numbers.reference(part) for role, numbers in frozen.items()}


def _batch_weights(
    target: Target, rows: TokenRows, live: ModelNumbers, frozen: dict[str, ModelNumbers]
) -> Tensor | None:
    if target.scope == "token":
        return None
    known = _references(frozen, slice(None))
    masked = rows.loss_weights is not None and rows.weights_scale == "all"
    return label_weights(
        target,
        torch.from_numpy(live.label_log_probs).float(),
        reference=known.get("reference"),
        sequence_ids=torch.from_numpy(rows.row_of_trained),
        mask=torch.from_numpy(rows.loss_weights > 0) if masked else None,  # pyright: ignore[reportOptionalOperand]
    )


def shared_outcomes(labels: Int[Tensor, " tokens"], live: Reference, frozen: dict[str, Reference]) -> Outcomes:
    """Put every model on the listed tokens that all of them list, the label, and the rest."""
    assert live.label_log_probs is not None
    with_lists = {role: numbers for role, numbers in frozen.items() if numbers.topk_ids is not None}
    if live.topk_ids is None:
        none = labels.new_zeros(len(labels), 0)
        kept = none.bool()
    else:
        none, kept = live.topk_ids, live.topk_ids >= 0
        for numbers in with_lists.values():
            kept = kept & ((none[:, :, None] == numbers.topk_ids[:, None, :]).any(-1))  # pyright: ignore[reportOptionalSubscript]
        kept = kept | (none == labels[:, None])
    ids = torch.where(kept, none, -1)
    at = ids == labels[:, None]
    slot = torch.where(at.any(-1), at.float().argmax(-1) if ids.shape[1] else 0, ids.shape[1]).long()
    return Outcomes(
        on_outcomes(live, ids, labels, slot),
        slot,
        {role: on_outcomes(numbers, ids, labels, slot) for role, numbers in frozen.items()},
    )


def on_outcomes(
    model: Reference, ids: Int[Tensor, "tokens k"], labels: Int[Tensor, " tokens"], slot: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens k_2"]:
    """One model's log-probs at ``ids`` (-1 is no outcome), at the label, and of all else; they sum to one.

    Never by subtraction where a sum will do: the rest is the model's tail and what it lists beyond ``ids``. The label,
    where no model lists it, comes out of that tail.
    """
    assert model.label_log_probs is not None
    label = model.label_log_probs[:, None]
    unlisted = slot == ids.shape[1]
    own = torch.where(unlisted[:, None], label, ABSENT)
    if model.topk_ids is None or model.topk_log_probs is None:
        listed = torch.full(ids.shape, ABSENT)
        listed = torch.where(ids == labels[:, None], label, listed)
        # the largest float32 below 1, or a certain label would leave log 0
        rest = torch.log1p(-label.exp().clamp(max=1 - 1e-7))
        return torch.cat([listed, own, rest], dim=-1).log_softmax(-1)
    at_label = (model.topk_ids == labels[:, None]) & (model.topk_ids >= 0)
    if ids.shape == model.topk_ids.shape and bool(((ids == model.topk_ids) | (ids < 0)).all()):
        listed, beyond = model.topk_log_probs.masked_fill(ids < 0, ABSENT), ids >= 0  # the model's own list
    else:
        listed, beyond = _looked_up(model, ids)
    listed = torch.where(ids == labels[:, None], label, listed)
    beyond = beyond | (model.topk_ids < 0) | at_label
    tail = torch.full_like(label, ABSENT) if model.tail_log_mass is None else model.tail_log_mass[:, None]
    if model.tail_policy == "renormalize":
        tail = torch.full_like(label, ABSENT)
    in_tail = ~at_label.any(-1, keepdim=True)
    # storage is rounded: the label may seem larger than the tail that holds it
    left = tail + torch.log1p(-(label - tail).exp().clamp(max=1 - 1e-6))
    tail = torch.where(in_tail, left, tail)
    rest = torch.cat([model.topk_log_probs.masked_fill(beyond, ABSENT), tail], dim=-1).logsumexp(-1, keepdim=True)
    return torch.cat([listed, own, rest], dim=-1).log_softmax(-1)


def _looked_up(model: Reference, ids: Int[Tensor, "tokens k"]) -> tuple[Tensor, Tensor]:
    """Log-probs ``[tokens, k]`` of ``ids`` in a model's list, and which ``[tokens, its k]`` of its entries they are."""
    assert model.topk_ids is not None and model.topk_log_probs is not None
    match = (ids[:, :, None] == model.topk_ids[:, None, :]) & (ids >= 0)[:, :, None]
    return torch.where(match, model.topk_log_probs[:, None, :], ABSENT).amax(-1), match.any(1)


def _chunk(
    target: Target,
    outcomes: Outcomes,
    live: ModelNumbers,
    frozen: dict[str, ModelNumbers],
    part: slice,
    batch_weights: Tensor | None,
    weighting: tuple[Tensor | None, WeightsScale],
    shown: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``a``, ``b``, mass moved, ``Q`` at the shown slots and the label, and what ``Q`` would be without a residual."""
    given, scale = weighting
    loss_weights = None if given is None else given[part]
    known = _references(frozen, part)
    models = {role: replace(known[role], log_probs=outcomes.frozen.get(role)) for role in known}
    for role, model in models.items():
        check_frozen(model, getattr(target.needs, role), target.name, role)
    view = _view(target, outcomes, models, live.reference(part), live.vocab_size, batch_weights)
    found = differentiate(target, view)
    a, b = found.pulls(loss_weights, scale)
    weights = found.combined(loss_weights, scale)
    # the uniform distribution is not uniform on these outcomes: the rest holds many tokens
    uniform = weights.pop("mean_log_prob", None)
    probs = outcomes.live.exp()
    gradient = logit_gradient(outcomes.live, outcomes.label, weights, models.get("reference"), models.get("teacher"))
    if uniform is not None:
        gradient = gradient + uniform[:, None] * (uniform_shares(outcomes, live.vocab_size) - probs)
    q = probs - gradient
    one_hot = torch.nn.functional.one_hot(outcomes.label, probs.shape[-1])
    plain = probs + a[:, None] * (one_hot - probs)

    def seen(values: Tensor) -> Tensor:
        # half of it: far below every log-prob, and above ABSENT whatever was subtracted from it
        absent = outcomes.live[:, : min(shown, values.shape[1] - 2)] < ABSENT / 2
        top = values[:, : absent.shape[1]].masked_fill(absent, torch.nan)
        return torch.cat([top, values.gather(-1, outcomes.label[:, None])], -1)

    return a, b, gradient.abs().sum(-1) / 2, seen(q), seen(plain)


def uniform_shares(outcomes: Outcomes, vocab_size: int) -> Float[Tensor, "tokens k_2"]:
    """The uniform distribution's mass on each outcome: one in V for a token, all the others' for the rest."""
    single: Bool[Tensor, "tokens k_2"] = outcomes.live > ABSENT / 2
    single = single.scatter(-1, torch.full_like(outcomes.label, single.shape[-1] - 1)[:, None], False)
    shares = single.float() / vocab_size
    shares[:, -1] = 1 - shares.sum(-1)
    return shares


def _view(
    target: Target,
    outcomes: Outcomes,
    models: dict[str, Reference],
    listed: Reference,
    vocab_size: int,
    batch_weights: Tensor | None,
) -> TokenView:
    """What the target sees: statistics of the whole vocabulary as they were listed, distributions on the outcomes."""
    needs = target.needs
    view = token_view(
        outcomes.live,
        outcomes.label,
        Needs(reference=needs.reference, teacher=needs.teacher),
        models.get("reference"),
        models.get("teacher"),
        label_weights=batch_weights,
    )
    level = torch.where(outcomes.live > ABSENT / 2, outcomes.live, 0.0)
    shares = uniform_shares(outcomes, vocab_size)
    rest = outcomes.live[:, -1] - (shares[:, -1] * vocab_size).clamp(min=1).log()
    mean = (level[:, :-1] * shares[:, :-1]).sum(-1) + shares[:, -1] * rest  # the rest spread evenly: an upper bound
    return replace(
        view,
        vocab_size=vocab_size,
        label_log_probs=listed.label_log_probs,
        entropy=listed.entropy if needs.entropy else None,
        top_log_probs=listed.topk_log_probs[:, : needs.top_k] if needs.top_k else None,  # pyright: ignore[reportOptionalSubscript]
        mean_log_prob=mean if needs.mean_log_prob else None,
    )
