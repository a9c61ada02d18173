"""The papers' formulas, written directly on full float64 logits: the oracle of the core's tests.

Nothing here imports qtarget. Each function takes the supervised tokens of one batch and returns the loss at each of
them, with the paper's stop-gradients (``detach``); autograd does the rest. ``ROWS`` holds the same methods as the
``(a, b, q)`` table has them, up to a scale ``c``: the logit gradient must be ``c (p - Q)`` with
``Q = a d_y + b q + (1 - a - b) p``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_TOKENS, NOISE_ROWS = 0.25, 0.75
"""Shares of noise that a cross-fit finds, in every case."""
RELIABILITY = 0.625
"""How much of what the rows agree on the frozen model knew, in every case."""


def agreement(labels: Tensor) -> Tensor:
    """An agreement for each label, in eighths: exact in every dtype. Masked labels (negative) get that of token 0."""
    return (labels.clamp(min=0) % 7) / 8


@dataclass(frozen=True)
class Tokens:
    """Supervised tokens, flat. ``z``, ``frozen``: ``[n, vocab]`` live and frozen logits; ``y``, ``sequence``: ``[n]``.

    ``groups``: ``[n, vocab]`` to which outcome each token belongs, where a frozen model is known on a few outcomes only
    (its top k one by one, everything else together); ``frozen_groups``: ``[n, outcomes]`` its probabilities of those.
    ``agreement``: ``[n]`` of the other rows, where that is not the function above of ``y``; ``rho``: the reliability;
    ``noise``: shares of tokens and of rows.
    """

    z: Tensor
    y: Tensor
    frozen: Tensor
    sequence: Tensor
    groups: Tensor | None = None
    frozen_groups: Tensor | None = None
    agreement: Tensor | None = None
    rho: float = RELIABILITY
    noise: tuple[float, float] = (NOISE_TOKENS, NOISE_ROWS)

    @property
    def lp(self) -> Tensor:
        return F.log_softmax(self.z, -1)

    @property
    def lp_y(self) -> Tensor:
        return self.lp[torch.arange(len(self.y)), self.y]

    @property
    def p_y(self) -> Tensor:
        """The probability of the label as a constant."""
        return self.lp_y.detach().exp()

    @property
    def frozen_lp_y(self) -> Tensor:
        return F.log_softmax(self.frozen, -1)[torch.arange(len(self.y)), self.y]

    @property
    def others(self) -> Tensor:
        """Agreement of the other rows with each label."""
        return (agreement(self.y) if self.agreement is None else self.agreement).to(self.z)

    @property
    def one_hot(self) -> Tensor:
        return F.one_hot(self.y, self.z.shape[-1]).to(self.z)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Live (with gradient) and frozen probabilities on the outcomes on which the two are compared."""
        p = torch.softmax(self.z, -1)
        if self.groups is None or self.frozen_groups is None:
            return p, torch.softmax(self.frozen, -1)
        member = F.one_hot(self.groups, self.frozen_groups.shape[-1]).to(p)
        return torch.einsum("nv,nvg->ng", p, member), self.frozen_groups


def xlogy(weight: Tensor, probs: Tensor) -> Tensor:
    """``sum weight log probs`` with ``0 log 0 = 0``, also in the gradient."""
    used = weight > 0
    return torch.where(used, weight * torch.where(used, probs, 1.0).log(), 0.0).sum(-1)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """``KL(first || second)`` of probabilities."""
    return xlogy(first, first) - xlogy(first, second)


def geometric(first: Tensor, second: Tensor, second_share: float) -> Tensor:
    """Normalised ``first^(1-w) second^w``, detached."""
    if second_share in (0, 1):
        return (second if second_share else first).detach()
    weights = first.detach() ** (1 - second_share) * second.detach() ** second_share
    return weights / weights.sum(-1, keepdim=True)


def label_loss(weight: Tensor, x: Tokens) -> Tensor:
    return -weight.detach() * x.lp_y


# -- weights -----------------------------------------------------------------------------------------------------


def top_k_entropy(z: Tensor, k: int) -> Tensor:
    p = torch.softmax(torch.sort(z.detach(), descending=True, dim=-1).values[:, :k], -1)
    return -(p * p.log()).sum(-1)


def talr_weight(x: Tokens, min_weight: float) -> Tensor:
    nll = -x.lp_y.detach()
    means = sorted(float(nll[x.sequence == s].mean()) for s in set(x.sequence.tolist()))
    tau = means[(len(means) - 1) // 2]
    return torch.maximum(torch.exp(-nll / tau), torch.full_like(nll, min_weight))


def iw_weight(x: Tokens, temperature: float, max_weight: float) -> Tensor:
    ratio = (x.lp_y - x.frozen_lp_y).detach()
    out = torch.zeros_like(ratio)
    for s in set(x.sequence.tolist()):
        mine = x.sequence == s
        out[mine] = torch.exp(temperature * ratio[mine].mean()).clamp(0.0, max_weight)
    return out


def top_share_weight(x: Tokens, keep_fraction: float) -> Tensor:
    excess = (-x.lp_y + x.frozen_lp_y).tolist()
    ranked = sorted(range(len(excess)), key=lambda i: -excess[i])
    kept = set(ranked[: math.ceil(round(keep_fraction * len(excess), 6))])
    return torch.tensor([float(i in kept) for i in range(len(excess))], dtype=x.z.dtype)


def inverse_weight(x: Tokens, power: float, clip: float) -> Tensor:
    w = (x.frozen_lp_y.exp() ** -power).clamp(max=clip)
    return w / w.mean()


def idft_weight(x: Tokens, beta: float) -> Tensor:
    p = torch.softmax(x.z.detach(), -1)
    entropy = -(p * p.log()).sum(-1)
    g = torch.exp(-(x.p_y.log() + entropy) / beta).clamp(0.1, 2.0)
    return x.p_y**g


def psft_ratio(x: Tokens) -> Tensor:
    return x.lp_y.exp() / x.frozen_lp_y.exp().detach()


# -- the paper's loss at each token --------------------------------------------------------------------------------


def psft(x: Tokens, clip_high: float) -> Tensor:
    r, advantage, clip_low = psft_ratio(x), 1.0, 0.2  # the lower clip never binds
    return -torch.minimum(r * advantage, r.clamp(1 - clip_low, 1 + clip_high) * advantage)


def sft_kl(x: Tokens, kl_weight: float) -> Tensor:
    p, q = x.pair()
    return -x.lp_y + kl_weight * kl(q, p)


def asft(x: Tokens, kl_weight: float) -> Tensor:
    p, q = x.pair()
    return -x.p_y * x.lp_y + kl_weight * kl(q, p)


def consensus_pulls(x: Tokens, caution: float) -> tuple[Tensor, Tensor]:
    """Weights of the label and of the anchor: the docstring of ``targets/consensus.py``, witness by witness."""
    base, known = x.frozen_lp_y.exp(), x.rho**3
    with_base = torch.where(x.p_y > base, x.p_y, base)
    with_rows = torch.where(x.p_y > x.others, x.p_y, x.others)
    support = x.rho * with_base + (1 - x.rho) * with_rows
    return support / (support + caution * (known + 0.01)), torch.full_like(base, 3 * caution * known)


def consensus(x: Tokens, caution: float) -> Tensor:
    p, q = x.pair()
    label, anchor = consensus_pulls(x, caution)
    return label_loss(label, x) + anchor * kl(q, p)


def crossfit_pulls(x: Tokens, caution: float) -> tuple[Tensor, Tensor]:
    """The docstring of ``targets/crossfit_consensus.py``; the copies' probability of a label is ``others``."""
    base, copy = x.frozen_lp_y.exp(), x.others
    rho = x.rho * (1 - torch.where(copy > base, copy - base, torch.zeros_like(base)))
    with_base = torch.where(x.p_y > base, x.p_y, base)
    with_copy = torch.where(x.p_y > copy, x.p_y, copy)
    support = rho * with_base + (1 - rho) * with_copy
    tokens, rows = x.noise
    kappa = caution * tokens
    if not caution:
        return torch.ones_like(base), torch.zeros_like(base)
    return support / (support + kappa * rho + 0.01 * caution * rows), kappa * rho


def crossfit_consensus(x: Tokens, caution: float) -> Tensor:
    p, q = x.pair()
    label, anchor = crossfit_pulls(x, caution)
    return label_loss(label, x) + anchor * kl(q, p)


def gem(x: Tokens, temperature: float, form: str) -> Tensor:
    z = x.z.detach()
    q = torch.softmax(z / temperature, -1)
    if form == "logsigmoid":
        z_y = z[torch.arange(len(x.y)), x.y]
        q = q * torch.sigmoid(0.01 * (z - z_y[:, None]))
    return -(q * (x.lp_y[:, None] - x.lp)).sum(-1)


def distillation(x: Tokens, temperature: float) -> Tensor:
    if temperature == 1:
        p, q = x.pair()
        return -xlogy(q, p)
    q = torch.softmax(x.frozen / temperature, -1)
    return temperature**2 * -(q * F.log_softmax(x.z / temperature, -1)).sum(-1)


def hybrid_distillation(x: Tokens, teacher_weight: float) -> Tensor:
    p, q = x.pair()
    return (1 - teacher_weight) * -x.lp_y + teacher_weight * -xlogy(q, p)


def gift_target(x: Tokens, beta: float, smoothing: float) -> Tensor:
    base = (1 - smoothing) * torch.softmax(x.frozen, -1) + smoothing / x.z.shape[-1]
    return torch.softmax(base.log() + beta * x.one_hot, -1)


def taid(x: Tokens, interpolation: float) -> Tensor:
    p, q = x.pair()
    return kl(geometric(p, q, interpolation), p)


def target_sft(x: Tokens, eta: float) -> Tensor:
    p, q = x.pair()
    return -x.p_y * x.lp_y + (1 - x.p_y) * -xlogy(geometric(p, q, eta), p)


def generalized_jsd(x: Tokens, beta: float) -> Tensor:
    s, t = x.pair()
    if beta in (0, 1):
        return kl(s, t) if beta else kl(t, s)
    m = (1 - beta) * s + beta * t
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


def skew_kl(x: Tokens, alpha: float) -> Tensor:
    s, t = x.pair()
    return kl(t, alpha * t + (1 - alpha) * s)


def skew_reverse_kl(x: Tokens, alpha: float) -> Tensor:
    s, t = x.pair()
    return kl(s, alpha * s + (1 - alpha) * t)


def p_power(x: Tokens, alpha: float) -> Tensor:
    return -x.lp_y if alpha == 0 else (1 - x.lp_y.exp() ** alpha) / alpha


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sft": lambda x: F.cross_entropy(x.z, x.y, reduction="none"),
    "label_smoothing": lambda x, smoothing: F.cross_entropy(x.z, x.y, reduction="none", label_smoothing=smoothing),
    "prior_surprise": lambda x: label_loss(1 - x.frozen_lp_y.exp(), x),
    "inverse_likelihood": lambda x, power, clip: label_loss(inverse_weight(x, power, clip), x),
    "dft": lambda x: label_loss(x.p_y, x),
    "p_power": p_power,
    "profit": lambda x, threshold: label_loss((x.p_y > threshold).double(), x),
    "eaft": lambda x, alpha, top_k: label_loss((top_k_entropy(x.z, top_k) / math.log(top_k)) ** alpha, x),
    "talr": lambda x, min_weight: label_loss(talr_weight(x, min_weight), x),
    "iw_sft": lambda x, temperature, max_weight: label_loss(iw_weight(x, temperature, max_weight), x),
    "rho1": lambda x, keep_fraction: label_loss(top_share_weight(x, keep_fraction), x),
    "token_cleaning": lambda x, keep_fraction: label_loss(top_share_weight(x, keep_fraction), x),
    "idft": lambda x, beta: label_loss(idft_weight(x, beta), x),
    "psft": psft,
    "sft_kl": sft_kl,
    "asft": asft,
    "consensus": consensus,
    "crossfit_consensus": crossfit_consensus,
    "gem": gem,
    "distillation": distillation,
    "hybrid_distillation": hybrid_distillation,
    "gift": lambda x, beta, smoothing: -(gift_target(x, beta, smoothing).detach() * x.lp).sum(-1),
    "taid": taid,
    "target_sft": target_sft,
    "forward_kl": lambda x: kl(x.pair()[1], x.pair()[0]),
    "reverse_kl": lambda x: kl(*x.pair()),
    "generalized_jsd": generalized_jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}

# -- the table of (a, b, q), up to a scale c -----------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """``g = c (p - Q)``, ``Q = a d_y + b q + (1 - a - b) p``; one number a token, ``q`` a distribution a token."""

    a: Tensor
    b: Tensor
    q: Tensor
    c: Tensor


def row(x: Tokens, a: Tensor | float, b: Tensor | float = 0.0, q: Tensor | None = None, c: Tensor | float = 1.0) -> Row:
    like = torch.ones_like(x.p_y)
    uniform = torch.full_like(x.z, 1 / x.z.shape[-1]).detach()
    return Row(*(like * v for v in (a, b)), uniform if q is None else q.detach(), like * c)


def frozen_probs(x: Tokens) -> Tensor:
    return torch.softmax(x.frozen, -1)


def consensus_row(x: Tokens, caution: float) -> Row:
    label, anchor = consensus_pulls(x, caution)
    return row(x, label / (label + anchor), anchor / (label + anchor), frozen_probs(x), label + anchor)


def crossfit_row(x: Tokens, caution: float) -> Row:
    label, anchor = crossfit_pulls(x, caution)
    return row(x, label / (label + anchor), anchor / (label + anchor), frozen_probs(x), label + anchor)


def psft_row(x: Tokens, clip_high: float) -> Row:
    r = psft_ratio(x).detach()
    return row(x, r * (r < 1 + clip_high))


def mixture_row(x: Tokens, a: Tensor | float, b: Tensor | float, share: float) -> Row:
    z = (1 - share) * x.z.detach() + share * x.frozen
    return row(x, a, b, torch.softmax(z, -1))


def gift_row(x: Tokens, beta: float, smoothing: float) -> Row:
    return row(x, 0.0, 1.0, gift_target(x, beta, smoothing))


ROWS: dict[str, Callable[..., Row | None]] = {
    "sft": lambda x: row(x, 1.0),
    "label_smoothing": lambda x, smoothing: row(x, 1 - smoothing, smoothing),
    "prior_surprise": lambda x: row(x, 1 - x.frozen_lp_y.exp()),
    "inverse_likelihood": lambda x, power, clip: row(x, inverse_weight(x, power, clip)),
    "dft": lambda x: row(x, x.p_y),
    "p_power": lambda x, alpha: row(x, x.p_y**alpha),
    "profit": lambda x, threshold: row(x, (x.p_y > threshold).double()),
    "eaft": lambda x, alpha, top_k: row(x, (top_k_entropy(x.z, top_k) / math.log(top_k)) ** alpha),
    "talr": lambda x, min_weight: row(x, talr_weight(x, min_weight)),
    "iw_sft": lambda x, temperature, max_weight: row(x, iw_weight(x, temperature, max_weight)),
    "rho1": lambda x, keep_fraction: row(x, top_share_weight(x, keep_fraction)),
    "token_cleaning": lambda x, keep_fraction: row(x, top_share_weight(x, keep_fraction)),
    "idft": lambda x, beta: row(x, idft_weight(x, beta)),
    "psft": psft_row,
    "sft_kl": lambda x, kl_weight: row(
        x, 1 / (1 + kl_weight), kl_weight / (1 + kl_weight), frozen_probs(x), 1 + kl_weight
    ),
    "asft": lambda x, kl_weight: row(
        x, x.p_y / (x.p_y + kl_weight), kl_weight / (x.p_y + kl_weight), frozen_probs(x), x.p_y + kl_weight
    ),
    "consensus": consensus_row,
    "crossfit_consensus": crossfit_row,
    "gem": lambda x, temperature, form: (
        row(x, 1.0, -1.0, torch.softmax(x.z.detach() / temperature, -1)) if form == "linear" else None
    ),
    "distillation": lambda x, temperature: row(x, 0.0, 1.0, frozen_probs(x)) if temperature == 1 else None,
    "hybrid_distillation": lambda x, teacher_weight: row(x, 1 - teacher_weight, teacher_weight, frozen_probs(x)),
    "gift": gift_row,
    "taid": lambda x, interpolation: mixture_row(x, 0.0, 1.0, interpolation),
    "target_sft": lambda x, eta: mixture_row(x, x.p_y, 1 - x.p_y, eta),
    "forward_kl": lambda x: row(x, 0.0, 1.0, frozen_probs(x)),
}
"""A row that is absent, or ``None`` for a hyper-parameter, says that the method is not of that form."""

# -- what to hand to each method, and which hyper-parameters to try ------------------------------------------------

FROZEN: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("prior_surprise", "inverse_likelihood", "iw_sft", "rho1"), ("reference", "label")),
    **dict.fromkeys(("token_cleaning", "psft"), ("reference", "label")),
    **dict.fromkeys(("sft_kl", "asft", "gift", "consensus", "crossfit_consensus"), ("reference", "distribution")),
    **dict.fromkeys(("distillation", "hybrid_distillation", "taid", "target_sft"), ("teacher", "distribution")),
    **dict.fromkeys(("forward_kl", "reverse_kl", "generalized_jsd"), ("teacher", "distribution")),
    **dict.fromkeys(("skew_kl", "skew_reverse_kl"), ("teacher", "distribution")),
}
"""The frozen model a method needs: its role, and whether one number a token is enough."""

COUNTED = {"consensus", "crossfit_consensus"}
"""Methods that also ask what the other rows or a cross-fit say: ``agreement`` and ``RELIABILITY`` in either's place."""

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "label_smoothing": [{"smoothing": 0.1}, {"smoothing": 0.0}, {"smoothing": 0.6}],
    "inverse_likelihood": [{"power": 1.0, "clip": 10.0}, {"power": 0.5, "clip": 3.0}],
    "p_power": [{"alpha": 0.5}, {"alpha": 0.0}, {"alpha": 3.0}],
    "profit": [{"threshold": 0.1}, {"threshold": 0.4}],
    "eaft": [{"alpha": 1.0, "top_k": 20}, {"alpha": 2.5, "top_k": 5}],
    "talr": [{"min_weight": 0.01}, {"min_weight": 0.3}],
    "iw_sft": [{"temperature": 1.0, "max_weight": 16.0}, {"temperature": 2.0, "max_weight": 1.1}],
    "rho1": [{"keep_fraction": 0.6}, {"keep_fraction": 1.0}],
    "token_cleaning": [{"keep_fraction": 0.6}, {"keep_fraction": 0.3}],
    "idft": [{"beta": 1.0}, {"beta": 0.4}],
    "psft": [{"clip_high": 0.28}],
    "sft_kl": [{"kl_weight": 0.1}, {"kl_weight": 0.0}],
    "asft": [{"kl_weight": 0.05}, {"kl_weight": 0.7}],
    "crossfit_consensus": [{"caution": 4.0}, {"caution": 0.3}, {"caution": 0.0}],
    "consensus": [{"caution": 1.0}, {"caution": 0.3}, {"caution": 0.0}],
    "gem": [{"temperature": 0.7, "form": "linear"}, {"temperature": 0.7, "form": "logsigmoid"}],
    "distillation": [{"temperature": 1.0}, {"temperature": 2.0}],
    "hybrid_distillation": [{"teacher_weight": 0.5}, {"teacher_weight": 0.9}],
    "gift": [{"beta": 20.0, "smoothing": 0.01}, {"beta": 1.5, "smoothing": 0.2}],
    "taid": [{"interpolation": 0.4}, {"interpolation": 1.0}],
    "target_sft": [{"eta": 0.3}, {"eta": 0.0}, {"eta": 1.0}],
    "generalized_jsd": [{"beta": 0.5}, {"beta": 0.1}, {"beta": 0.0}, {"beta": 1.0}],
    "skew_kl": [{"alpha": 0.1}, {"alpha": 0.0}],
    "skew_reverse_kl": [{"alpha": 0.1}, {"alpha": 0.0}],
}
"""Hyper-parameters to try; all of a method's, so that a changed default cannot hide."""


def losses(name: str, x: Tokens, settings: dict[str, Any]) -> Tensor:
    """The paper's loss at each token.

    Raises:
        AssertionError: nobody has written the oracle yet.
    """
    assert name in LOSSES, (
        f"target {name!r} has no oracle: write its paper's formula on full logits into LOSSES in "
        "tests/conformance/formulas.py (and its row into ROWS, what it needs into FROZEN, settings into SETTINGS)"
    )
    return LOSSES[name](x, **settings)


def table_row(name: str, x: Tokens, settings: dict[str, Any]) -> Row | None:
    """The method's row of the ``(a, b, q)`` table, if it has one."""
    return ROWS[name](x, **settings) if name in ROWS else None
