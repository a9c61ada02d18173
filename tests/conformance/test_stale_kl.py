"""Penalties towards a reference on samples that are stale, in exact expectation: what `docs/rl.md` tabulates."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import qtarget
from tests import ROOT

VOCAB, DRAWS = 50, 200
DRIFTS = (0.0, 0.5, 1.0, 2.0)
ESTIMATORS = ("k1", "k2", "k3", "k3 x r", "full vocabulary")


def expected_loss(name: str, z: Tensor, sampled: Tensor, reference: Tensor) -> Tensor:
    """What a trainer differentiates, its expectation over the sampler taken exactly; rows are draws."""
    log_p = z.log_softmax(-1)
    if name == "full vocabulary":
        known = qtarget.Reference(log_probs=reference)
        labels = torch.zeros(len(z), dtype=torch.long)
        return qtarget.target_loss(z, labels, "reverse_kl", teacher=known, reduction="sum")
    gap = log_p - reference
    values = {"k1": gap, "k2": gap**2 / 2, "k3": torch.exp(-gap) + gap - 1}
    values["k3 x r"] = (log_p - sampled).exp() * values["k3"]
    return (sampled.exp() * values[name]).sum()


def measured() -> dict[str, list[tuple[float, float]]]:
    """Mean cosine with the gradient of ``KL(p || reference)``, and mean length along it, by estimator and drift."""
    rng = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(DRAWS, VOCAB, generator=rng, dtype=torch.float64)

    out: dict[str, list[tuple[float, float]]] = {name: [] for name in ESTIMATORS}
    old, noise = 1.5 * normal(), normal()
    reference = (old + 0.3 * normal()).log_softmax(-1)  # the policy has not gone far when it samples
    for drift in DRIFTS:
        z = (old + drift * noise).requires_grad_()
        log_p = z.log_softmax(-1)
        (truth,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), z)
        for name in ESTIMATORS:
            (found,) = torch.autograd.grad(expected_loss(name, z, old.log_softmax(-1), reference), z)
            along = (found * truth).sum(-1) / truth.norm(dim=-1)
            norm = found.norm(dim=-1)
            cosine = torch.where(norm > 1e-12, along / norm.clamp(min=1e-12), 0.0)
            out[name].append((float(cosine.mean()), float((along / truth.norm(dim=-1)).mean())))
    return out


@pytest.fixture(scope="module")
def table() -> dict[str, list[tuple[float, float]]]:
    return measured()


def test_the_whole_vocabulary_is_exact_at_any_age(table) -> None:
    for name in ("full vocabulary", "k3 x r"):
        for cosine, length in table[name]:
            assert (cosine, length) == pytest.approx((1, 1), abs=1e-9)


def test_k1_has_no_force_and_then_pushes_away(table) -> None:
    assert table["k1"][0] == pytest.approx((0, 0), abs=1e-9)
    assert all(cosine < -0.5 for cosine, _ in table["k1"][1:])


def test_k3_overshoots_with_age(table) -> None:
    lengths = [length for _, length in table["k3"]]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 5
    assert table["k3"][-1][0] < 0.8


def test_the_page_has_these_numbers(table) -> None:
    page = (ROOT / "docs/rl.md").read_text(encoding="utf-8")
    for name in ESTIMATORS:
        (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", page, flags=re.MULTILINE)
        told = [tuple(float(number) for number in cell.split(", ")) for cell in row.split(" | ")]
        for numbers, found in zip(told, table[name], strict=True):
            assert numbers == pytest.approx(found, rel=0.01, abs=0.006)
