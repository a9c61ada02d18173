"""``lens``: what losses teach, as one JSON document. Pure: losses in, numbers and findings out.

Every loss sees the same tokens. *Probes* are random tokens, to tell which form its gradient has; the *sweep* moves ``p_y``
from 0 to 1 and leaves everything else as it is, to be drawn; *checks* are batches with masks, padding and parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qtarget.core.errors import LossUnderLensError
from qtarget.core.shapes import Float, Tensor
from qtarget.report.lens.checks import averages, run_checks
from qtarget.report.lens.form import Form, Probes, features, fit_form, name_weight, refit, with_label_probs
from qtarget.report.lens.losses import Loss, gradient
from qtarget.report.page import finite

VERSION = 1
VOCAB = 32  # eaft looks at the 20 likeliest
PROBES = 160
SWEEP = [0.002, *(round(0.01 * i, 2) for i in range(1, 100)), 0.998]
SITUATIONS = (("unlikely", 0.02), ("undecided", 0.3), ("agreed", 0.9))
OBSERVED, LIVE_FAVOURITE, FROZEN_FAVOURITE = 0, 1, 2
SIMPLEX_TOLERANCE = 1e-6
SAID_ERROR = 1e-5  # a form that is this far from the gradient is said to be close, not exact

SETTING = {
    "vocabulary": VOCAB,
    "probes": PROBES,
    "sweep": "p_y from 0.002 to 0.998; of the rest the live model gives half to its own favourite, 15 % to the frozen model's "
    "favourite, and spreads what is left evenly",
    "frozen": "synthetic, not a trained model: 60 % on its own favourite, 20 % on the observed token, 10 % on the live model's "
    "favourite, the rest even; at the probes random logits, independent of the live model's",
    "rows": "none: where a target asks what the other rows or a cross-fit say, each of these numbers is 0.5 at every token",
    "tokens": ["observed", "live model's favourite", "frozen model's favourite", f"the other {VOCAB - 3} together"],
    "update": "minus the gradient by the logit, of a loss in which the one token has weight one",
}


def lens(losses: Sequence[Loss]) -> dict[str, Any]:
    """What each loss teaches.

    Returns:
        ``{"kind", "version", "setting", "losses"}``, JSON values only; ``losses`` holds one document each, see ``look``.

    Raises:
        LossUnderLensError: a loss cannot be called, differentiated, or its gradient is not finite at the probes.
    """
    return {"kind": "qtarget lens", "version": VERSION, "setting": SETTING, "losses": [look(loss) for loss in losses]}


def look(loss: Loss) -> dict[str, Any]:
    """One loss: its form, its curves over ``p_y``, the induced target in three situations, and the checks.

    Raises:
        LossUnderLensError: see ``lens``.
    """
    checks, scale = run_checks(loss)
    averaged = averages(scale)
    probes, sweep = gradients(loss, *random_tokens(), averaged), gradients(loss, *swept_tokens(), averaged)
    form = fit_form(probes, "frozen" in loss.takes)
    symbol = loss.frozen_symbol if "frozen" in loss.takes else None
    document = {
        "name": loss.name,
        "source": loss.source,
        "formula": loss.target.formula if loss.target else None,
        "frozen": symbol,
        "called_with": {"layout": loss.layout, "shift": loss.shift, "takes": sorted(loss.takes)},
        "scale": scale,
        "form": describe_form(form, probes, symbol),
        "simplex": describe_simplex(probes, sweep),
        "curves": curves(sweep, refit(sweep, form), form),
        "situations": [situation(sweep, name, p_y) for name, p_y in SITUATIONS],
        "checks": checks,
    }
    return document | {"verdict": verdict(document), "titles": titles(document)}


def random_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, frozen logits and labels of the probes; ``p_y`` and ``p_frozen(y)`` cover (0.005, 0.98) and (0.02, 0.98)."""
    rng = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return 1.5 * torch.randn(PROBES, VOCAB, generator=rng, dtype=torch.float64)

    live, frozen = normal(), normal()
    labels = torch.randint(VOCAB, (PROBES,), generator=rng)
    p_y = torch.sigmoid(torch.linspace(-5.3, 3.9, PROBES, dtype=torch.float64))
    p_frozen = 0.02 + 0.96 * torch.rand(PROBES, generator=rng, dtype=torch.float64)
    return with_label_probs(live, labels, p_y), with_label_probs(frozen, labels, p_frozen), labels


def swept_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, frozen logits and labels of the sweep."""
    live = torch.full((len(SWEEP), VOCAB), 0.35 / (VOCAB - 3), dtype=torch.float64)
    live[:, LIVE_FAVOURITE], live[:, FROZEN_FAVOURITE] = 0.5, 0.15
    frozen = torch.full_like(live, 0.1 / (VOCAB - 3))
    frozen[:, [OBSERVED, LIVE_FAVOURITE, FROZEN_FAVOURITE]] = torch.tensor([0.2, 0.1, 0.6], dtype=torch.float64)
    labels = torch.full((len(SWEEP),), OBSERVED)
    return with_label_probs(live.log(), labels, torch.tensor(SWEEP, dtype=torch.float64)), frozen.log(), labels


def gradients(loss: Loss, logits: Tensor, frozen: Tensor, labels: Tensor, averaged: bool) -> Probes:
    """The loss at these tokens, each a sequence of its own, all in one batch.

    Raises:
        LossUnderLensError: the gradient is not finite.
    """
    _, found = gradient(loss, logits[:, None], labels[:, None], frozen[:, None])
    # a loss that averages gives each token its share: undone, as if each were alone
    found = found[:, 0].double() * (len(labels) if averaged else 1)
    if not bool(found.isfinite().all()):
        p = logits.softmax(-1).gather(-1, labels[:, None])[:, 0]
        bad = (~found.isfinite().all(-1)).nonzero()[0, 0]
        raise LossUnderLensError(
            f"loss {loss.name!r}: the gradient is not finite at {int((~found.isfinite().all(-1)).sum())} of {len(p)} tokens, "
            f"the first with p_y = {float(p[bad]):.3g}; look for log(0), 0/0, or exp without a bound (use log_softmax)"
        )
    return Probes(logits, frozen, labels, found)


def describe_form(form: Form, x: Probes, symbol: str | None) -> dict[str, Any]:
    """Whether ``g = (a+b) p - a d_y - b q`` holds, and what ``a``, ``b`` and ``q`` are."""
    known = features(x, symbol)
    fits = bool(form.fits.all())
    q = None
    if form.residual is not None:
        share = form.parameter or 0.0
        q = form.residual.name.format(f"{share:.4g}", f"{1 - share:.4g}")
    sums = x.gradient.sum(-1).abs() / x.gradient.norm(dim=-1).clamp(min=1e-300)
    return {
        "fits": fits,
        "largest_relative_error": form.error,
        "a": _weight(form.label_weight, known, fits),
        "b": _weight(form.residual_weight, known, fits),
        "q": q,
        "q_parameter": form.parameter,
        "largest_pull": float((form.label_weight + form.residual_weight).max()) if fits else None,
        "smallest_pull": float(torch.minimum(form.label_weight, form.residual_weight).min()) if fits else None,
        "gradient_sums_to_zero": bool((sums < 1e-3).all()),
    }


def _weight(values: Tensor, known: dict[str, Tensor], fits: bool) -> dict[str, Any]:
    return {
        "name": name_weight(values, known) if fits else None,
        "smallest": float(values.min()),
        "largest": float(values.max()),
    }


def describe_simplex(*parts: Probes) -> dict[str, Any]:
    """Whether ``Q = p - g`` is a distribution at every token looked at; where not, how far it is from one."""
    target = torch.cat([x.probs - x.gradient for x in parts])
    p_y = torch.cat([x.probs.gather(-1, x.labels[:, None])[:, 0] for x in parts])
    negative = target.clamp(max=0.0).sum(-1).neg()
    outside = negative > SIMPLEX_TOLERANCE
    worst = int(negative.argmax())
    return {
        "inside": not bool(outside.any()),
        "share_outside": float(outside.double().mean()),
        "largest_negative_mass": float(negative[worst]),
        "at_p_y": float(p_y[worst]),
        "outside_p_y": [float(p_y[outside].min()), float(p_y[outside].max())] if bool(outside.any()) else None,
        "largest_sum_error": float((target.sum(-1) - 1).abs().max()),
    }


def curves(x: Probes, at: Form, form: Form) -> dict[str, list[float | None]]:
    """Over ``p_y``: updates (minus the gradient) of three tokens and of the rest, ``a`` and ``b``, the mass of ``Q`` on y."""
    update = -x.gradient
    fits = bool(form.fits.all())
    return {
        "p_y": list(SWEEP),
        "observed": update[:, OBSERVED].tolist(),
        "live_favourite": update[:, LIVE_FAVOURITE].tolist(),
        "frozen_favourite": update[:, FROZEN_FAVOURITE].tolist(),
        "others": update[:, FROZEN_FAVOURITE + 1 :].sum(-1).tolist(),
        "a": [finite(v) if fits else None for v in at.label_weight.tolist()],
        "b": [finite(v) if fits else None for v in at.residual_weight.tolist()],
        "q_observed": (x.probs - x.gradient)[:, OBSERVED].tolist(),
    }


def situation(x: Probes, name: str, p_y: float) -> dict[str, Any]:
    """``p``, the frozen model and the induced ``Q`` on three tokens and the rest, at one point of the sweep."""
    at = SWEEP.index(p_y)

    def shown(values: Float[Tensor, " vocab"]) -> list[float]:
        parts = [*values[: FROZEN_FAVOURITE + 1].tolist(), float(values[FROZEN_FAVOURITE + 1 :].sum())]
        return [round(part, 12) for part in parts]  # -1e-17 is a zero

    probs = x.probs[at]
    return {
        "name": name,
        "p_y": p_y,
        "p": shown(probs),
        "frozen": shown(x.frozen[at].softmax(-1)),
        "target": shown(probs - x.gradient[at]),
    }


def titles(document: dict[str, Any]) -> dict[str, str]:
    """What each figure shows, as a finding."""
    shown = document["curves"]
    at = max(range(len(SWEEP)), key=lambda i: abs(shown["observed"][i]))
    peak, p_y = shown["observed"][at], SWEEP[at]
    form = document["form"]
    first = document["situations"][0]
    moved = first["target"][0]
    if not form["fits"]:
        weights = "No label and residual weight describe it"
    else:
        weights = "Label weight a = " + (form["a"]["name"] or "no known formula")
        weights += f", residual weight b = {form['b']['name'] or 'no known formula'}" if form["q"] else ""
    return {
        "updates": "The observed token is never pushed"
        if abs(peak) < 1e-12
        else f"The observed token is pushed hardest at p_y = {p_y:g} (by {peak:.3g})",
        "weights": weights,
        "situations": f"Where the model gives the observed token {first['p_y']:g}, Q gives it {moved:.3g}",
    }


def verdict(document: dict[str, Any]) -> list[str]:
    """What a person should know, in sentences."""
    form, simplex = document["form"], document["simplex"]
    said = [_form_sentence(form)]
    if not form["gradient_sums_to_zero"]:
        said.append("Its gradient does not sum to zero: it also moves the level of all logits (as a z-loss does).")
    if simplex["inside"]:
        said.append("Q is a distribution at every token looked at.")
    else:
        low, high = simplex["outside_p_y"]
        said.append(
            f"Q leaves the simplex at {100 * simplex['share_outside']:.0f} % of the tokens looked at (p_y from {low:.3g} to "
            f"{high:.3g}), by at most {simplex['largest_negative_mass']:.3g} of mass below zero."
        )
        if form["fits"] and form["largest_pull"] > 1 and form["smallest_pull"] >= 0:
            said.append(f"a + b reaches {form['largest_pull']:.3g}: divide the loss by that, and Q is a distribution.")
    faults = [check["finding"] for check in document["checks"] if check["status"] == "fault"]
    if not any(fault.startswith(document["scale"]["finding"]) for fault in faults):
        said.append(document["scale"]["finding"])
    if document["scale"]["depends_on_other_tokens"]:
        said.append(
            "A token's weight is made over the batch: constants and thresholds here are those of this page's tokens."
        )
    return said + [f"Fault: {finding}" for finding in faults]


def _form_sentence(form: dict[str, Any]) -> str:
    if not form["fits"]:
        return (
            "It is not of the form (a+b) p - a d_y - b q with any residual that is known here: the closest misses the "
            f"gradient by up to {100 * form['largest_relative_error']:.2g} %."
        )
    words = [
        f"{letter} = {form[letter]['name']}"
        if form[letter]["name"] is not None
        else f"{letter} between {form[letter]['smallest']:.3g} and {form[letter]['largest']:.3g} (no known formula)"
        for letter in ("a", "b")
    ]
    residual = f", q = {form['q']}" if form["q"] else ""
    error = form["largest_relative_error"]
    close = f" (the gradient to {error:.1g})" if error > SAID_ERROR else ""
    return f"It fits g = (a+b) p - a d_y - b q with {' and '.join(words)}{residual}{close}."
