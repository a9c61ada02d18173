"""Which ``(a, b, q)`` a gradient has: the residual ``q`` among the known kinds, ``a`` and ``b`` token by token, and their names.

For some ``q`` every gradient is of the form (take ``b`` large), so ``q`` is looked for among the kinds that the field uses
and a loss that none of them explains does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qtarget.core.induced import fit_pulls
from qtarget.core.shapes import Bool, Float, Int, Tensor

TOLERANCE = 1e-4
"""Relative error up to which a form counts as exact: a loss that computes in float32 reaches 1e-5 at our probes."""
GOLDEN = (math.sqrt(5) - 1) / 2
FLAT_MIN = 2  # equal extreme values that make a cap or a floor
NAMED_MIN = 6  # values that a formula must explain before it is named


@dataclass(frozen=True)
class Probes:
    """Tokens at which a loss is looked at: each a row of its own.

    Attributes:
        logits, frozen: ``[tokens, vocab]`` of the live and the synthetic frozen model.
        labels: ``[tokens]``.
        gradient: ``[tokens, vocab]`` of the loss, scaled so that one token alone has weight one in the sum.
    """

    logits: Float[Tensor, "tokens vocab"]
    frozen: Float[Tensor, "tokens vocab"]
    labels: Int[Tensor, " tokens"]
    gradient: Float[Tensor, "tokens vocab"]

    @property
    def probs(self) -> Float[Tensor, "tokens vocab"]:
        return self.logits.softmax(-1)

    @property
    def one_hot(self) -> Float[Tensor, "tokens vocab"]:
        return torch.nn.functional.one_hot(self.labels, self.logits.shape[-1]).double()


def with_label_probs(
    logits: Float[Tensor, "... vocab"], labels: Int[Tensor, "..."], label_probs: Float[Tensor, "..."]
) -> Float[Tensor, "... vocab"]:
    """The same logits but for the label's, which is set so that the label has this probability."""
    at_label = labels[..., None]
    others = logits.scatter(-1, at_label, -torch.inf).logsumexp(-1)
    return logits.scatter(-1, at_label, (others + label_probs.logit())[..., None])


@dataclass(frozen=True)
class Residual:
    """One kind of ``q``: its name (``{0}`` is the parameter, ``{1}`` one minus it), and where the parameter is looked for."""

    name: str
    make: Callable[[Probes, float], Tensor]
    spans: tuple[tuple[float, float], ...] = ()
    needs_frozen: bool = False


def _uniform(x: Probes, _: float) -> Tensor:
    return torch.full_like(x.logits, 1 / x.logits.shape[-1])


RESIDUALS = (
    Residual("uniform", _uniform),
    Residual("the frozen model", lambda x, _: x.frozen.softmax(-1), needs_frozen=True),
    # A temperature near 1, or a share near 0, makes q the model itself: then b has no bound and anything close to it fits.
    Residual(
        "the model itself at temperature {0}", lambda x, t: (x.logits / t).softmax(-1), ((0.2, 0.93), (1.08, 4.0))
    ),
    Residual(
        "softmax({1} z + {0} z_frozen)",
        lambda x, s: ((1 - s) * x.logits + s * x.frozen).softmax(-1),
        ((0.05, 1.0),),
        needs_frozen=True,
    ),
    Residual(
        "{1} of the frozen model + {0} uniform",
        lambda x, s: (1 - s) * x.frozen.softmax(-1) + s / x.logits.shape[-1],
        ((0.0, 1.0),),
        needs_frozen=True,
    ),
)


@dataclass(frozen=True)
class Form:
    """The closest form of some probes.

    Attributes:
        label_weight, residual_weight: ``[tokens]`` ``a`` and ``b``.
        fits: ``[tokens]`` whether they reproduce the gradient.
        error: the largest relative error of the gradient.
        residual: which kind ``q`` is, None where nothing but the label pulls.
        parameter: of that kind, if it has one.
    """

    label_weight: Tensor
    residual_weight: Tensor
    fits: Tensor
    error: float
    residual: Residual | None
    parameter: float | None


def fit_form(x: Probes, with_frozen: bool) -> Form:
    """The first kind of residual that explains all gradients; if none does, the closest."""
    tried = [_fitted(x, None, None)]
    for kind in RESIDUALS:
        if bool(tried[-1].fits.all()):
            break
        if not kind.needs_frozen or with_frozen:
            parameter = _search(x, kind) if kind.spans else None
            tried.append(_fitted(x, kind, parameter))
    if bool(tried[-1].fits.all()):
        return tried[-1]
    return min(tried, key=lambda form: form.error)


def refit(x: Probes, form: Form) -> Form:
    """``a`` and ``b`` at other probes, with the residual that is already known."""
    return _fitted(x, form.residual, form.parameter)


def _errors(x: Probes, a: Tensor, b: Tensor, q: Tensor) -> Tensor:
    rest = x.gradient - a[:, None] * (x.probs - x.one_hot) - b[:, None] * (x.probs - q)
    scale = x.gradient.norm(dim=-1)
    # a gradient of zero has no relative error
    return torch.where(scale > 0, rest.norm(dim=-1) / scale.clamp(min=1e-300), rest.norm(dim=-1))


def _fitted(x: Probes, kind: Residual | None, parameter: float | None) -> Form:
    if kind is None:
        direction = x.probs - x.one_hot
        a = (x.gradient * direction).sum(-1) / (direction * direction).sum(-1)
        b, q = torch.zeros_like(a), x.probs
    else:
        q = kind.make(x, 0.0 if parameter is None else parameter)
        a, b, _ = fit_pulls(x.gradient, x.probs, x.one_hot, q, 1e-12)  # an exact b, however small
    errors = _errors(x, a, b, q)
    return Form(a, b, errors <= TOLERANCE, float(errors.max()), kind, parameter)


def _search(x: Probes, kind: Residual) -> float:
    """The parameter with the smallest summed error: a grid on each span, then golden section around its best point."""

    def cost(parameter: float) -> float:
        q = kind.make(x, parameter)
        a, b, _ = fit_pulls(x.gradient, x.probs, x.one_hot, q, 1e-12)
        return float(_errors(x, a, b, q).sum())

    # the grid first: golden section finds the bottom of one valley, and there may be several
    best = (math.inf, 0.0)
    for low, high in kind.spans:
        grid = torch.linspace(low, high, 17).tolist()
        costs = [cost(v) for v in grid]
        at = min(range(len(grid)), key=costs.__getitem__)
        best = min(best, (costs[at], grid[at]), _golden(cost, grid[max(0, at - 1)], grid[min(at + 1, len(grid) - 1)]))
    return best[1]


def _golden(cost: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    costs = [cost(v) for v in inner]
    for _ in range(36):  # the bracket shrinks to 3e-8 of itself
        if costs[0] < costs[1]:
            high, inner[1], costs[1] = inner[1], inner[0], costs[0]
            inner[0] = high - GOLDEN * (high - low)
            costs[0] = cost(inner[0])
        else:
            low, inner[0], costs[0] = inner[0], inner[1], costs[1]
            inner[1] = low + GOLDEN * (high - low)
            costs[1] = cost(inner[1])
    at = costs.index(min(costs))
    return costs[at], inner[at]


# -- names -----------------------------------------------------------------------------------------------------------


def features(x: Probes, frozen_symbol: str | None) -> dict[str, Tensor]:
    """What label weights are made of in the literature, by name; ``[tokens]`` each."""
    at_label = x.labels[:, None]
    p = x.probs.gather(-1, at_label)[:, 0]
    log_probs = x.logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    top = x.logits.topk(min(20, x.logits.shape[-1]), dim=-1).values.log_softmax(-1)
    found = {
        "p_y": p,
        "(1 - p_y)": 1 - p,
        "(H_20 / ln 20)": -(top.exp() * top).sum(-1) / math.log(top.shape[-1]),
        "(H / ln V)": entropy / math.log(x.logits.shape[-1]),
        "p_y^clip(exp(-log p_y - H), 0.1, 2)": p ** (-p.log() - entropy).exp().clamp(0.1, 2.0),
    }
    if frozen_symbol:
        frozen = x.frozen.softmax(-1).gather(-1, at_label)[:, 0]
        found |= {
            f"{frozen_symbol}(y)": frozen,
            f"(1 - {frozen_symbol}(y))": 1 - frozen,
            f"(p_y / {frozen_symbol}(y))": p / frozen,
        }
    return found


def name_weight(values: Float[Tensor, " tokens"], known: dict[str, Tensor]) -> str | None:
    """A formula that reproduces a weight: a constant, ``c f^k`` with cap and floor, a threshold, ``c + d f``, focal; or None.

    Example:
        >>> p = torch.linspace(0.1, 0.9, 9)
        >>> name_weight(2 * p**0.5, {"p_y": p})
        '2 p_y^0.5'
    """
    largest = float(values.abs().max())
    if largest < TOLERANCE:
        return "0"
    off = values.abs() < 1e-9 * largest
    on = values[~off]
    if len(on) < NAMED_MIN or bool((on < 0).any() and (on > 0).any()):
        return None
    sign = "-" if float(on[0]) < 0 else ""
    body = _formula(on.abs(), {name: f[~off] for name, f in known.items()})
    if body is None:
        return None
    where = _threshold(off, known) if bool(off.any()) else ""
    if where is None:
        return None
    if where:
        return sign + (where.strip() if body == "1" else body + where)
    return sign + (body if sign else _bare(body, known))


def _formula(values: Tensor, known: dict[str, Tensor]) -> str | None:
    low, high = float(values.min()), float(values.max())
    if high - low <= TOLERANCE * high:
        return _number(float(values.mean()))
    at_cap, at_floor = (values >= high * (1 - 1e-6)), (values <= low * (1 + 1e-6))
    capped, floored = int(at_cap.sum()) >= FLAT_MIN, int(at_floor.sum()) >= FLAT_MIN
    inner = ~((at_cap & capped) | (at_floor & floored))
    for name, f in known.items():
        if int(inner.sum()) < NAMED_MIN:
            return None
        power = _power(values, f, inner, low if floored else 0.0, high if capped else math.inf)
        if power is None:
            continue
        text = _term(*power, name)
        if capped:
            text = f"min({_bare(text, known)}, {_number(high)})"
        return f"max({_bare(text, known)}, {_number(low)})" if floored else text
    return _affine(values, known) or _focal(values, known)


def _power(
    values: Tensor, f: Tensor, inner: Bool[Tensor, " tokens"], low: float, high: float
) -> tuple[float, float] | None:
    """``(c, k)`` of ``clip(c f^k, low, high)`` where that is exact."""
    if float(f[inner].max()) <= float(f[inner].min()) * (1 + 1e-9):
        return None
    # in logarithms c f^k is a straight line, which least squares finds at once
    design = torch.stack([torch.ones_like(f), f.log()], -1)
    c, k = torch.linalg.lstsq(design[inner], values[inner].log()[:, None]).solution[:, 0].tolist()
    predicted = (math.exp(c) * f**k).clamp(low, high)
    return (math.exp(c), k) if bool(((predicted - values).abs() <= 3 * TOLERANCE * values).all()) else None


def _affine(values: Tensor, known: dict[str, Tensor]) -> str | None:
    for name, f in known.items():
        design = torch.stack([torch.ones_like(f), f], -1)
        c, d = torch.linalg.lstsq(design, values[:, None]).solution[:, 0].tolist()
        if bool(((design @ torch.tensor([c, d]).to(f) - values).abs() <= TOLERANCE * values).all()):
            return f"{_number(c)} {'+' if d > 0 else '-'} {_term(abs(d), 1.0, name)}"
    return None


def _focal(values: Tensor, known: dict[str, Tensor]) -> str | None:
    p = known["p_y"]
    for gamma in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0):
        weight = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()
        scale = float((values / weight).mean())
        if bool(((scale * weight - values).abs() <= TOLERANCE * values).all()):
            front = "" if _number(scale) == "1" else f"{_number(scale)} "
            return f"{front}((1 - p_y)^f - f p_y (1 - p_y)^(f-1) log p_y), f = {_number(gamma)} (focal)"
    return None


def _threshold(off: Bool[Tensor, " tokens"], known: dict[str, Tensor]) -> str | None:
    """Which feature, above or below which value, switches a weight on; None if no single one does."""
    for name, f in known.items():
        above, below = (float(f[off].max()), float(f[~off].min())), (float(f[~off].max()), float(f[off].min()))
        for (low, high), relation in ((above, ">"), (below, "<")):
            # known up to the gap between two probes, so its middle is told, with a ~
            if low < high:
                return f" 1[{_bare(name, known)} {relation} ~{_number((low + high) / 2, 2)}]"
    return None


def _bare(text: str, known: dict[str, Tensor]) -> str:
    """A formula that is one bracketed feature, without its brackets."""
    return text[1:-1] if text in known and text.startswith("(") else text


def _term(c: float, k: float, name: str) -> str:
    factor = "" if _number(c) == "1" else f"{_number(c)} "
    return factor + (name if _number(k) == "1" else f"{name}^{_number(k)}")


def _number(value: float, digits: int = 4) -> str:
    return f"{0.0 if abs(value) < 1e-9 else value:.{digits}g}"
