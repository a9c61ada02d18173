"""Run by ``test_compiled.py`` in a process without the annotations' checker, which no compiler can follow.

``python compiled.py NAME SETTINGS OTHER``: the oracle's numbers for both settings of a target, compiled once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

import qtarget

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
    if target.has_label_term:
        arguments["loss_weights"] = torch.linspace(0.5, 2.0, tokens, dtype=torch.float64)
    loss, report = qtarget.linear_target_loss(
        hidden, weight, labels, target, backend=backend, return_report=True, **arguments
    )
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, (hidden, weight)), *vars(report).values()]


def check(name: str, settings: dict[str, Any], other: dict[str, Any]) -> None:
    """Chunks of other sizes reuse what the first two calls compiled; the last of 16 tokens by 5 is one token alone."""
    compiled = 0
    head = {"logit_scale": 0.7, "logit_softcap": 6.0}
    for turn, (tokens, size, chosen) in enumerate(
        ((11, 4, settings), (11, 4, other), (17, 5, other), (16, 8, settings))
    ):
        ours = losses(name, chosen, "compiled", tokens, chunk_size=size, **head)
        exact = losses(name, chosen, "dense", tokens, **head)
        for value, right in zip(ours, exact, strict=True):
            torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-12)
        compiled = counters["stats"]["unique_graphs"] if turn == 1 else compiled
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    check(sys.argv[1], *map(json.loads, sys.argv[2:4]))
