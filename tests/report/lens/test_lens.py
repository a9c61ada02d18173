"""The lens on losses whose answer is known: every built-in against its row of the table, names of weights, curves, simplex."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import qtarget
from qtarget.report.lens.checks import averages, describe_scale
from qtarget.report.lens.document import SWEEP, gradients, lens, look, random_tokens
from qtarget.report.lens.form import Probes, fit_form, name_weight
from qtarget.report.lens.losses import callable_under_lens, load_loss, target_under_lens
from tests.conformance import formulas

CASES = [
    pytest.param(name, settings, id="-".join([name, *(f"{k}={v}" for k, v in settings.items())]))
    for name in qtarget.available_targets()
    for settings in formulas.SETTINGS.get(name, [{}])
]
ROWS_OF_TABLE = {
    # a, b, q at the defaults, as design and papers write them
    "sft": ("1", "0", None),
    "label_smoothing": ("0.9", "0.1", "uniform"),
    "prior_surprise": ("1 - p_ref(y)", "0", None),
    "dft": ("p_y", "0", None),
    "p_power": ("p_y^0.5", "0", None),
    "eaft": ("H_20 / ln 20", "0", None),
    "iw_sft": ("min(p_y / p_ref(y), 16)", "0", None),
    "idft": ("p_y^clip(exp(-log p_y - H), 0.1, 2)", "0", None),
    "sft_kl": ("1", "0.1", "the frozen model"),
    "asft": ("p_y", "0.05", "the frozen model"),
    "gem": ("1", "-1", "the model itself at temperature 0.7"),
    "distillation": ("0", "1", "the frozen model"),
    "forward_kl": ("0", "1", "the frozen model"),
    "hybrid_distillation": ("0.5", "0.5", "the frozen model"),
    "taid": ("0", "1", "softmax(0.6 z + 0.4 z_frozen)"),
    "target_sft": ("p_y", "1 - p_y", "softmax(0.7 z + 0.3 z_frozen)"),
}


def probes_of(name: str, settings: dict[str, Any]) -> tuple[Probes, bool]:
    loss = target_under_lens(qtarget.get_target(name, **settings))
    return gradients(loss, *random_tokens(), averages(describe_scale(loss))), "frozen" in loss.takes


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_every_built_in_has_its_row_of_the_table(name: str, settings: dict[str, Any]) -> None:
    """The oracle: the papers' losses and the table's rows on full logits, which import nothing of qtarget."""
    probes, with_frozen = probes_of(name, settings)
    form = fit_form(probes, with_frozen)
    x = formulas.Tokens(
        probes.logits.clone().requires_grad_(),
        probes.labels,
        probes.frozen,
        torch.arange(len(probes.labels)),
        agreement=torch.full(probes.labels.shape, 0.5),
        rho=0.5,
        noise=(0.5, 0.5),
    )
    (gradient,) = torch.autograd.grad(formulas.losses(name, x, settings).sum(), x.z)
    torch.testing.assert_close(probes.gradient, gradient, rtol=1e-9, atol=1e-12)
    row = formulas.table_row(name, x, settings)
    linear_limit = settings.get("beta") == 0.0 or settings.get("alpha") == 0.0  # of jsd and skew_kl: forward KL
    if row is None:
        if name in ("generalized_jsd", "skew_kl") and linear_limit:
            a, b = torch.zeros(len(probes.labels)), torch.ones(len(probes.labels))
        elif settings.get("form") == "logsigmoid":  # a sigmoid of slope 0.01 all but tempers: close, and not exact
            assert 1e-6 < form.error < 1e-4
            return
        else:
            assert not bool(form.fits.all())
            return
    else:
        a, b = row.c * row.a, row.c * row.b
    assert bool(form.fits.all()), form.error
    if name == "gift":
        w_y = (1 - settings["smoothing"]) * x.frozen_lp_y.exp() + settings["smoothing"] / 32
        bonus = math.expm1(settings["beta"]) * w_y
        a, b = bonus / (1 + bonus), 1 / (1 + bonus)
    if name == "target_sft" and settings["eta"] == 0.0:
        b = torch.zeros_like(b)  # the residual is the model itself: no pull
    torch.testing.assert_close(form.label_weight, a.double().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(form.residual_weight, b.double().detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROWS_OF_TABLE)
def test_the_document_names_the_row(name: str) -> None:
    form = look(load_loss(name))["form"]
    assert form["fits"]
    assert (form["a"]["name"], form["b"]["name"], form["q"]) == ROWS_OF_TABLE[name]


@pytest.mark.parametrize(
    ("name", "feature", "relation", "threshold"),
    [("profit", "p_y", ">", 0.1), ("psft", "p_y / p_ref(y)", "<", 1.28), ("profit(threshold=0.4)", "p_y", ">", 0.4)],
)
def test_thresholds_are_found(name: str, feature: str, relation: str, threshold: float) -> None:
    said = look(load_loss(name))["form"]["a"]["name"]
    assert f"1[{feature} {relation} ~" in said
    assert float(said.split("~")[1].rstrip("]")) == pytest.approx(threshold, rel=0.06)


def test_weights_over_the_batch_are_named_and_said() -> None:
    document = look(load_loss("rho1"))
    assert document["scale"]["depends_on_other_tokens"]
    assert document["form"]["a"]["name"].startswith("1[p_y / p_ref(y) <")
    assert any("made over the batch" in sentence for sentence in document["verdict"])
    assert look(load_loss("talr"))["form"]["a"]["name"].startswith("max(p_y^")
    assert "p_ref(y)^-1" in look(load_loss("inverse_likelihood"))["form"]["a"]["name"]
    for name in ("sft", "eaft", "psft", "gift"):
        assert not look(load_loss(name))["scale"]["depends_on_other_tokens"]


P = torch.linspace(0.01, 0.97, 60, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (torch.full_like(P, 3.0), "3"),
        (torch.zeros_like(P), "0"),
        (-(P**0.25), "-p_y^0.25"),
        (0.5 * (1 - P) ** 2, "0.5 (1 - p_y)^2"),
        ((4 * P**2).clamp(max=1.0), "min(4 p_y^2, 1)"),
        ((4 * P**2).clamp(0.1, 1.0), "max(min(4 p_y^2, 1), 0.1)"),
        (0.2 + 0.6 * P, "0.2 + 0.6 p_y"),
        ((1 - P) ** 2 - 2 * P * (1 - P) * P.log(), "((1 - p_y)^f - f p_y (1 - p_y)^(f-1) log p_y), f = 2 (focal)"),
        (P.sin() + P.cos() * P**3, None),
        (P - 0.5, None),
        ((P * 50).floor() % 2, None),
    ],
)
def test_names_of_weights(values: torch.Tensor, name: str | None) -> None:
    assert name_weight(values, {"p_y": P, "(1 - p_y)": 1 - P}) == name


def test_simplex_and_its_distance() -> None:
    """``3 x`` cross entropy: Q = 3 d_y - 2 p, so the mass below zero is 2 (1 - p_y) off the label."""
    document = look(callable_under_lens(lambda logits, labels: 3 * F.cross_entropy(logits, labels), "triple"))
    simplex = document["simplex"]
    assert not simplex["inside"]
    assert simplex["largest_negative_mass"] == pytest.approx(2 * (1 - 0.002), rel=1e-6)
    assert simplex["at_p_y"] == pytest.approx(0.002)
    assert any("divide the loss by that" in sentence for sentence in document["verdict"])
    assert look(load_loss("dft"))["simplex"]["inside"]
    assert not look(load_loss("gem"))["simplex"]["inside"]


def test_curves_and_situations_are_the_formulas() -> None:
    """dft by hand: the label moves by p (1 - p); the favourite, with half of the rest, by -p (1 - p) / 2."""
    document = look(load_loss("dft"))
    p = torch.tensor(SWEEP, dtype=torch.float64)
    curves = {name: torch.tensor(values, dtype=torch.float64) for name, values in document["curves"].items()}
    torch.testing.assert_close(curves["observed"], p * (1 - p))
    torch.testing.assert_close(curves["live_favourite"], -p * (1 - p) / 2)
    torch.testing.assert_close(curves["a"], p)
    torch.testing.assert_close(curves["q_observed"], p + p * (1 - p))
    assert document["titles"]["updates"] == "The observed token is pushed hardest at p_y = 0.5 (by 0.25)"
    at = next(s for s in document["situations"] if s["p_y"] == 0.3)
    assert at["target"] == pytest.approx([0.51, 0.245, 0.0735, 0.1715])
    assert at["frozen"] == pytest.approx([0.2, 0.1, 0.6, 0.1])


def test_the_document_is_plain_json_with_its_keys() -> None:
    document = lens([load_loss("asft"), load_loss("reverse_kl")])
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["kind"] == "qtarget lens" and document["version"] == 1
    for loss in document["losses"]:
        assert set(loss) == {
            "name", "source", "formula", "frozen", "called_with", "scale", "form", "simplex", "curves", "situations",
            "checks", "verdict", "titles",
        }  # fmt: skip
        assert {len(values) for values in loss["curves"].values()} == {len(SWEEP)}
        assert {check["status"] for check in loss["checks"]} <= {"pass", "note", "warn", "fault", "skip"}
    assert [loss["frozen"] for loss in document["losses"]] == ["p_ref", "p_T"]
    assert document["losses"][1]["curves"]["a"] == [None] * len(SWEEP)


@pytest.mark.parametrize("name", qtarget.available_targets())
def test_no_built_in_has_a_fault(name: str) -> None:
    """Each is tested elsewhere, by the conformance suite, for what these checks look at."""
    checks = look(load_loss(name))["checks"]
    assert [check for check in checks if check["status"] == "fault"] == []
    assert next(c for c in checks if c["name"] == "denominator")["status"] == "pass"
