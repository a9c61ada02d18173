"""The lines of the contract that are tried on tokens: what a target computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qtarget.contract.device import ElsewhereError, elsewhere, moved
from qtarget.contract.probe import ROWS, TIME, Probe, broken, probes, run, told
from qtarget.core.coefficients import coefficients, leaf_view
from qtarget.core.shapes import Tensor
from qtarget.core.types import LabelWeight, Target, Terms
from qtarget.loss.dispatch import loss_from_logits

TOLERANCE = 1e-6
CLAMP = "clamp the weight, or compute it from log-probs"


def check_terms(target: Target) -> None:
    """``losses`` returns ``Terms`` of one loss a token, with the terms that the flags declare."""
    for probe in probes(target):
        terms, _ = run(target, probe)
        if not isinstance(terms, Terms):
            raise broken(
                target,
                "terms",
                f"losses returned a {type(terms).__name__}",
                "qtarget.Terms(label=..., residual=...) with one loss a token",
                "wrap it",
            )
        for name, flag in (("label", "has_label_term"), ("residual", "has_residual")):
            term, declared = getattr(terms, name), getattr(target, flag)
            if (term is not None) != declared:
                came = f"{flag} is {declared}, and losses returned {'a' if term is not None else 'no'} {name} term"
                raise broken(target, "terms", came, "what the class declares", f"set {flag} = {not declared}")
            if term is None:
                continue
            shape = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            if shape != (len(probe.labels),):
                step = "return one number a token: no mean, no sum over tokens (the loss divides once)"
                came = (
                    f"the {name} term has shape {shape}"
                    if isinstance(term, Tensor)
                    else f"the {name} term is a {shape}"
                )
                raise broken(target, "terms", came, f"[tokens], here ({len(probe.labels)},)", step)
        if terms.label is None and terms.residual is None:
            raise broken(
                target, "terms", "neither term is there", "a label term, a residual term, or both", "return one"
            )


def check_numbers(target: Target) -> None:
    """Losses keep the dtype, are finite at the ends, and their gradient reaches the model."""
    for dtype in (torch.float32, torch.float64):
        for probe in probes(target, dtype):
            terms, leaves = run(target, probe)
            for name, term in named(terms):
                if term.dtype != dtype:
                    step = "make constants with torch.full_like or plain numbers, and no .float() or .double()"
                    raise broken(target, "dtype", f"{dtype} gave a {name} term of {term.dtype}", f"{dtype}", step)
                if not bool(term.isfinite().all()):
                    raise broken(target, "finite", extreme(f"{name} term", term, probe), "finite losses", CLAMP)
            gradient = coefficients(terms.total().sum(), leaves)
            for name, value in gradient.items():
                if not bool(value.isfinite().all()):
                    came = extreme(f"gradient by {name}", value if value.dim() == 1 else value.sum(-1), probe)
                    raise broken(target, "finite", came, "finite gradients", CLAMP)
            if not any(bool(value.any()) for value in gradient.values()):
                came = "the losses do not depend on the live model"
                step = "detach weights only, and not x.label_log_probs or all of the loss"
                raise broken(target, "gradient", came, "a gradient at some token", step)


def extreme(what: str, values: Tensor, probe: Probe) -> str:
    """The first token that is not finite, in words."""
    at = int((~values.isfinite()).nonzero()[0])
    live, frozen = (float(z.log_softmax(-1)[at, probe.labels[at]]) for z in (probe.logits, probe.frozen))
    where = f"where log p_y is {live:.4g} (frozen model: {frozen:.4g})"
    return f"the {what} is {float(values[at].detach())} in {probe.logits.dtype} {where}"


def named(terms: Terms) -> list[tuple[str, Tensor]]:
    """The terms that are there."""
    both = (("label", terms.label), ("residual", terms.residual))
    return [(name, term) for name, term in both if term is not None]


def check_weights(target: Target) -> None:
    """Weights on the observed token are constants: finite, at least 0 where they are all, and detached."""
    step = "detach it (x.label_probs is detached), or set live_weights = True where the paper differentiates it"
    for probe in probes(target):
        if isinstance(target, LabelWeight):
            view = leaf_view(probe.view(target))[0] if target.scope == "token" else probe.view(target)
            weights = target.label_weights(view)
            if weights.requires_grad:
                raise broken(target, "weights", "label_weights carries a gradient", "a constant", step)
            if bool((weights < 0).any()):
                came = f"label_weights goes down to {float(weights.min()):.4g}"
                raise broken(target, "weights", came, "weights of at least 0", "clamp them: .clamp(min=0)")
        if target.live_weights:
            continue
        terms, leaves = run(target, probe)
        for name, term in named(terms):
            if (moving := moves(name, term, leaves)) is not None:
                raise broken(target, "weights", f"the weight of the {name} term follows {moving}", "a constant", step)


def moves(name: str, term: Tensor, leaves: dict[str, Tensor]) -> str | None:
    """The live statistic that the term's weight is differentiated by, if any."""
    if not term.requires_grad:
        return None
    label = leaves["label_log_probs"]
    grads = torch.autograd.grad(term.sum(), list(leaves.values()), create_graph=True, allow_unused=True)
    found = dict(zip(leaves, grads, strict=True))
    own = found.pop("label_log_probs")
    if name == "residual":  # whatever it is of distributions, it is not of the label
        return "the label's probability" if own is not None and bool(own.any()) else None
    if other := next((key for key, value in found.items() if value is not None and bool(value.any())), None):
        return f"the live {other}"
    if own is None or not own.requires_grad:
        return None
    (second,) = torch.autograd.grad(own.sum(), label, allow_unused=True)
    return "the label's probability" if second is not None and bool(second.any()) else None


def totals(target: Target, probe: Probe) -> Tensor:
    """Detached losses."""
    return run(target, probe)[0].total().detach()


def check_repeats(target: Target) -> None:
    """The same tokens give the same losses, and so do logits that are all higher by a constant."""
    probe = Probe.of(target)
    before = totals(target, probe)
    if not torch.equal(before, totals(target, probe)):
        came = "the same tokens twice gave different losses"
        step = "no random numbers, no state between calls, and nothing of the view changed in place"
        raise broken(target, "repeatable", came, "the same", step)
    after = totals(target, replace(probe, logits=probe.logits + 7.5))
    if not alike(before, after):
        came = f"logits raised by 7.5 changed a loss by {float((after - before).abs().max()):.3g}"
        step = "use log-probs and differences of logits only"
        raise broken(target, "invariant", came, "the same loss: a softmax does not see a constant", step)


def alike(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def check_scope(target: Target) -> None:
    """A token's loss depends on its own token, sequence or batch, as the scope says: batches are split."""
    if target.scope == "batch":
        return
    probe = Probe.of(target)
    whole, size = totals(target, probe), 1 if target.scope == "token" else TIME
    for start in range(0, len(whole), size):
        part = slice(start, start + size)
        if not alike(whole[part], totals(target, probe.rows(part))):
            came = f"a {target.scope}'s loss depends on the rest of the batch"
            step = (
                'let it see one token at a time (no mean, sort or sum over tokens), or set scope = "batch" and put what '
                "it computes over the batch into label_weights"
            )
            raise broken(target, "scope", came, f"what scope = {target.scope!r} says", step)


def check_masked(target: Target) -> None:
    """Masked tokens cost nothing, teach nothing, and change nothing for the others, whatever stands there."""
    probe = Probe.of(target)
    masked = torch.arange(len(probe.labels)) % 4 == 1
    known = {role: probe.known(frozenset(getattr(target.needs, role))) for role in ("reference", "teacher")}
    leading = (ROWS, TIME)
    shaped: dict[str, Any] = {
        role: None if m is None else m.map_tensors(lambda _, v: v.reshape(*leading, *v.shape[1:]))
        for role, m in known.items()
    }
    logits = probe.logits.masked_fill(masked[:, None], torch.nan).reshape(*leading, -1).requires_grad_()
    labels = probe.labels.masked_fill(masked, -100).reshape(leading)
    others: dict[str, Any] = dict.fromkeys(("sequence_ids", "loss_weights", "label_weights"))
    losses, _, _ = loss_from_logits(
        logits, labels, target, num_items=None, reduction="none", weights_scale="all", ignore_index=-100,
        want_report=False, **shaped, **others,
    )  # fmt: skip
    losses.sum().backward()
    assert logits.grad is not None
    kept = totals(target, probe.rows(~masked))
    found = losses.detach().flatten()
    if bool(found[masked].any()) or bool(logits.grad.flatten(0, 1)[masked].any()) or not alike(found[~masked], kept):
        came = "masked tokens (label -100) have a loss or change that of others"
        raise broken(target, "masked", came, "zero", "compute each loss from its own token of the view")


def check_device(target: Target) -> None:
    """Losses stay on the view's device: tried on one that is none, since many machines have only one."""
    for probe in probes(target, torch.float32):
        view = probe.view(target)
        try:
            with torch.no_grad(), elsewhere():
                terms = target.losses(moved(view))
        except ElsewhereError as error:
            came, step = (
                f"losses mix devices: {told(error, target)}",
                "make tensors with device=x.label_log_probs.device",
            )
            raise broken(target, "device", came, "all on the device of the view", step) from error
        except Exception:  # something that such tensors cannot do says nothing of devices
            continue
        for name, term in named(terms):
            if term.device.type == "cpu":
                came, step = f"the {name} term is on the CPU", "no .cpu(); device=x.label_log_probs.device"
                raise broken(target, "device", came, "the device of the view", step)


TRIED = (check_terms, check_numbers, check_weights, check_repeats, check_scope, check_masked, check_device)
"""In their order: later lines rely on earlier ones."""
