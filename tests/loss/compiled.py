"""Run by ``test_compiled.py`` in a process without the annotations' checker, which no compiler can follow.

``python compiled.py NAME SETTINGS OTHER``: the oracle's numbers for both settings of a target, compiled once. Without
arguments: what is refused, and what the speed benchmark runs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import qtarget
from qtarget.benchmarks.speed import losses as speed
from qtarget.core.errors import IncompatibleError
from qtarget.core.types import Needs, Target, Terms, TokenView
from qtarget.loss import whole_rows

VOCAB = 61


def drawn(tokens: int) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 4, generator=rng, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCAB, 4, generator=rng, dtype=torch.float64).requires_grad_()
    labels = torch.randint(VOCAB, (tokens,), generator=rng)
    labels[2] = -100
    return hidden, weight, labels


def losses(name: str, settings: dict[str, Any], backend: str, tokens: int, **arguments: Any) -> list[torch.Tensor]:
    """Loss, both gradients and the report."""
    hidden, weight, labels = drawn(tokens)
    target = qtarget.get_target(name, **settings)
    frozen = qtarget.FrozenHead(hidden.detach() + 0.3, weight.detach().flip(0), logit_softcap=8.0)
    arguments |= {role: frozen for role in ("reference", "teacher") if getattr(target.needs, role)}
    arguments["loss_weights"] = torch.linspace(0.5, 2.0, tokens, dtype=torch.float64)
    loss, report = qtarget.linear_target_loss(
        hidden, weight, labels, target, backend=backend, return_report=True, **arguments
    )
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, (hidden, weight)), *vars(report).values()]


def check(name: str, settings: dict[str, Any], other: dict[str, Any]) -> None:
    """Another setting and other sizes reuse what the first call compiled; the last of 16 tokens by 5 is alone."""
    compiled = 0
    head = {"logit_scale": 0.7, "logit_softcap": 6.0}
    for turn, (tokens, size, chosen) in enumerate(
        ((11, 4, settings), (11, 4, other), (17, 5, other), (16, 8, settings))
    ):
        ours = losses(name, chosen, "compiled", tokens, chunk_size=size, **head)
        exact = losses(name, chosen, "dense", tokens, **head)
        for value, right in zip(ours, exact, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-12)
        compiled = counters["stats"]["unique_graphs"] if turn == 0 else compiled
    assert compiled == counters["stats"]["unique_graphs"] > 0, counters["stats"]
    check_without_gradients(name, settings)


def check_without_gradients(name: str, settings: dict[str, Any]) -> None:
    """The value alone, also under inference mode, whose tensors autograd may not save."""
    hidden, weight, labels = drawn(11)
    target = qtarget.get_target(name, **settings)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            frozen = qtarget.FrozenHead(hidden + 0.3, weight.flip(0))
            arguments: dict[str, Any] = {r: frozen for r in ("reference", "teacher") if getattr(target.needs, r)}
            values = [
                qtarget.linear_target_loss(hidden, weight, labels, target, backend=backend, **arguments)
                for backend in ("compiled", "chunked")
            ]
        assert not values[0].requires_grad
        torch.testing.assert_close(*values)


@dataclass(frozen=True)
class Asks(Target):
    """A target that looks at values in Python, which no compiler can follow."""

    name = "asks"
    formula = "none"
    paper = "none"

    @property
    def needs(self) -> Needs:
        return Needs(log_probs=True)

    def losses(self, x: TokenView) -> Terms:
        assert x.log_probs is not None
        return Terms(label=-x.label_log_probs if float(x.log_probs.detach().sum()) < 0 else x.label_log_probs)


def check_refusals() -> None:
    """What cannot be compiled, and an error of the target's own, in its own words."""
    hidden, weight, labels = drawn(11)

    with pytest.raises(IncompatibleError, match=r"could not compile this loss .*use backend='chunked'"):
        qtarget.linear_target_loss(hidden, weight, labels, Asks(), backend="compiled")
    frozen = qtarget.FrozenHead(hidden.detach(), weight.detach())
    weights = torch.ones(11, dtype=torch.float64)
    with pytest.raises(IncompatibleError, match="has none"):
        qtarget.linear_target_loss(
            hidden,
            weight,
            labels,
            "skew_kl",
            backend="compiled",
            teacher=frozen,
            loss_weights=weights,
            weights_scale="label",
        )


def check_many_columns() -> None:
    """A piece holds two tokens at least: one alone would not be compiled."""
    wide = [t.detach().float() for t in (torch.randn(4, 1), torch.randn(300_000, 1))]
    calls: list[int] = []
    kept, whole_rows.fused = (
        whole_rows.fused,
        lambda: lambda z, *rest: calls.append(len(z)) or whole_rows.whole_rows(z, *rest),
    )
    qtarget.linear_target_loss(*wide, torch.arange(4), "gem", backend="compiled")
    whole_rows.fused = kept
    assert calls == [2, 2]


def check_speed() -> None:
    """The benchmark's compiled contenders run."""
    config = speed.SpeedConfig(tokens=6, width=4, vocab=64, rounds=1, top_k=4, peers=False)
    steps = speed.contenders(config, speed.Problem.make(config))
    compiled = [name for name in steps if name.endswith(", compiled")]
    assert len(compiled) == len(speed.LIVE), list(steps)
    steps["reverse_kl, live teacher, compiled"]()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:]:
        check(sys.argv[1], *map(json.loads, sys.argv[2:4]))
    else:
        check_refusals()
        check_many_columns()
        check_speed()
