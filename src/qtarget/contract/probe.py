"""A handful of made-up tokens, and a target of the user's own tried on them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from qtarget.core.coefficients import leaf_view
from qtarget.core.errors import ContractError
from qtarget.core.shapes import Tensor
from qtarget.core.statistics import token_statistics, token_view
from qtarget.core.types import DATA_FIELDS, Needs, Reference, Target, Terms, TokenView
from qtarget.loss.dispatch import batch_label_weights

ROWS, TIME, VOCAB, LISTED = 3, 6, 24, 8
UNLIKELY, CERTAIN = -90.0, 40.0
"""Log-odds, nats, of labels at the ends: the inverse of such a probability is beyond float32."""
STATISTICS = ("entropy", "mean_log_prob", "top_k", "log_probs")
FROZEN = ("label_log_probs", "entropy", "log_probs", "distribution", *DATA_FIELDS)
"""What ``needs`` may ask of a frozen model."""


def broken(target: Target, line: str, came: str, expected: str, step: str) -> ContractError:
    """One wording for every line."""
    name = getattr(target, "name", None)
    named = name if isinstance(name, str) and name else type(target).__name__
    return ContractError(f'target {named!r} breaks the contract, line "{line}": {came}; expected {expected}; {step}')


@dataclass(frozen=True)
class Probe:
    """Tokens to try a target on, all of them trained; the first few are extreme.

    Attributes:
        logits, frozen: ``[tokens, vocab]`` of the live and of a frozen model.
        labels, sequence_ids: ``[tokens]``.
        share: ``[tokens]`` what the data says of a label, in [0, 1).
        sparse: whether the frozen model is known by its top k.
    """

    logits: Tensor
    frozen: Tensor
    labels: Tensor
    sequence_ids: Tensor
    share: Tensor
    sparse: bool = False

    @classmethod
    def of(cls, target: Target, dtype: torch.dtype = torch.float64, *, sparse: bool = False) -> Probe:
        """Always the same tokens."""
        tokens, vocab = ROWS * TIME, max(VOCAB, target.needs.top_k + 1)
        rng = torch.Generator().manual_seed(0)
        live, frozen = 1.5 * torch.randn(2, tokens, vocab, generator=rng, dtype=torch.float64)
        labels = torch.randint(vocab, (tokens,), generator=rng)
        # the label all but certain or excluded: for the live model, the frozen one, both
        for at, (odds, frozen_odds) in enumerate(
            ((CERTAIN, 0), (UNLIKELY, 0), (0, CERTAIN), (0, UNLIKELY), (UNLIKELY,) * 2)
        ):
            for logits, odd in ((live, odds), (frozen, frozen_odds)):
                if odd:
                    logits[at, labels[at]] = -torch.inf
                    logits[at, labels[at]] = logits[at].logsumexp(-1) + odd
        share = torch.linspace(0, 0.95, tokens, dtype=dtype)
        return cls(live.to(dtype), frozen.to(dtype), labels, torch.arange(tokens) // TIME, share, sparse)

    def rows(self, index: Any) -> Probe:
        """Some of the tokens."""
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "sparse"})

    def known(self, wanted: frozenset[str]) -> Reference | None:
        """The frozen model, as far as it is asked for and no further: a cache holds no more either."""
        if not wanted:
            return None
        found = token_statistics(self.frozen, self.labels, top_k=LISTED)
        every = dict.fromkeys(DATA_FIELDS, self.share) | {
            "label_log_probs": found.label_log_probs,
            "entropy": found.entropy,
            "log_probs": self.frozen.log_softmax(-1),
        }
        given: dict[str, Any] = {name: every[name] for name in wanted if name != "distribution"}
        if "distribution" in wanted:
            listed = ("topk_ids", "topk_log_probs", "tail_log_mass") if self.sparse else ()
            given |= {name: getattr(found, name) for name in listed} or {"log_probs": every["log_probs"]}
        return Reference(**given)

    def view(self, target: Target, needs: Needs | None = None) -> TokenView:
        """What the target gets to see, as in training."""
        needs = target.needs if needs is None else needs
        reference, teacher = self.known(frozenset(needs.reference)), self.known(frozenset(needs.teacher))
        ids = self.sequence_ids
        view = token_view(self.logits.log_softmax(-1), self.labels, needs, reference, teacher, ids)
        if target.scope == "token":
            return view
        return replace(view, label_weights=batch_label_weights(target, view.label_log_probs, reference, ids))


def probes(target: Target, dtype: torch.dtype = torch.float64) -> Iterator[Probe]:
    """Whole distributions of the frozen model, and the top k that a cache holds."""
    yield Probe.of(target, dtype)
    if "distribution" in target.needs.reference | target.needs.teacher:
        yield Probe.of(target, dtype, sparse=True)


def run(target: Target, probe: Probe) -> tuple[Terms, dict[str, Tensor]]:
    """The terms of these tokens, and the statistics that they are differentiated by.

    Raises:
        ContractError: the target's code raised.
    """
    try:
        view, leaves = leaf_view(probe.view(target))
        return target.losses(view), leaves
    except Exception as error:  # the user's own code
        came = f"losses raised {told(error, target)}"
        step = "correct it there"
        if target.scope != "token":
            step += (
                f" (label_weights of a {target.scope} sees label_log_probs, reference and sequence_ids, and no more)"
            )
        if (lacking := lacks(target, probe)) is not None:
            step = f"it reads what it did not ask for: let needs return {lacking}"
        raise broken(target, "runs", came, "losses from what needs asks for", step) from error


def lacks(target: Target, probe: Probe) -> str | None:
    """What ``needs`` leaves out, in words, where the target would run with one thing more."""
    more = [Needs(**{name: LISTED if name == "top_k" else True}) for name in STATISTICS]  # pyright: ignore[reportArgumentType]
    more += [Needs(**{role: frozenset({field})}) for role in ("reference", "teacher") for field in FROZEN]  # pyright: ignore[reportArgumentType]
    for extra in more:
        try:
            target.losses(leaf_view(probe.view(target, target.needs | extra))[0])
        except Exception:  # this was not what it lacks
            continue
        (name,) = (f.name for f in fields(Needs) if getattr(extra, f.name) != f.default)
        value = getattr(extra, name)
        return f"Needs({name}={f'frozenset({{{min(value)!r}}})' if isinstance(value, frozenset) else value})"
    return None


def told(error: BaseException, target: Target) -> str:
    """An error of the target's code, with its line there."""
    own = getattr(sys.modules.get(type(target).__module__), "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if own is not None and f.filename == own]
    where = f" ({Path(own).name}, line {lines[-1]})" if own is not None and lines else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{f': {text}' if text else ''}{where}"
