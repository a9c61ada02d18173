"""What a careless change of the core would let through: ties, entropies of banned tokens, what counts as a pull."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import qtarget
from qtarget.core.residuals import reverse_kl
from qtarget.core.types import Needs, Target, Terms, TokenView


@dataclass(frozen=True)
class Bonus(Target):
    """``-log p_y - bonus H``: an entropy that is differentiated."""

    bonus: float = 0.5

    name = "bonus"
    formula = "-log p_y - bonus H"
    paper = "test"

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True)

    def losses(self, x: TokenView) -> Terms:
        assert x.entropy is not None
        return Terms(label=-x.label_log_probs - self.bonus * x.entropy)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FORMS: dict[str, dict[str, Any]] = {"dense": {"backend": "dense"}, "chunked": {"backend": "chunked", "chunk_size": 3}}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("banned", [[], [2, 5]])
def test_an_entropy_and_its_gradient_where_tokens_are_banned(form: str, banned: list[int]) -> None:
    """Against the sum over the tokens that are left, differentiated by autograd."""
    labels = torch.tensor([0, 1, 3, 4, 6, 0, 1])
    bias = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf)
    found = []
    for ours in (True, False):
        hidden, weight = drawn(7, 4).requires_grad_(), drawn(9, 4, seed=1).requires_grad_()
        if ours:
            loss, report = qtarget.linear_target_loss(
                hidden, weight, labels, Bonus(), bias=bias, reduction="sum", return_report=True, **FORMS[form]
            )
        else:
            left = [i for i in range(9) if i not in banned]
            log_probs = (hidden @ weight[left].T).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            at_label = log_probs[torch.arange(7), torch.tensor([left.index(int(y)) for y in labels])]
            loss = (-at_label - 0.5 * entropy).sum()
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(report.entropy, entropy.detach())
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@dataclass(frozen=True)
class WholeBonus(Bonus):
    """The same, of a target that reads whole rows."""

    name = "whole_bonus"

    @property
    def needs(self) -> Needs:
        return Needs(entropy=True, log_probs=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [Bonus(), WholeBonus()], ids=["columns", "whole rows"])
def test_the_gradient_of_an_entropy_at_a_banned_label(form: str, target: Target) -> None:
    """The loss is infinite; its gradient is that of ever lower logits."""
    found = []
    for level, arguments in ((-1e5, FORMS["dense"]), (-torch.inf, FORMS[form])):
        hidden, weight = drawn(4, 4).requires_grad_(), drawn(9, 4, seed=1).requires_grad_()
        bias = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor([2, 5]), level)
        labels = torch.tensor([0, 2, 3, 5])
        loss = qtarget.linear_target_loss(hidden, weight, labels, target, bias=bias, **arguments)
        assert bool(loss.isinf()) == (level == -torch.inf)
        found.append(torch.autograd.grad(loss, (hidden, weight)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_entropy_pulls_towards_nothing(form: str) -> None:
    """``a`` is the pull of ``-log p_y`` alone, whatever the bonus."""
    arguments = {"return_report": True, "loss_weights": torch.tensor([1.0, 0.5]).double(), **FORMS[form]}
    for bonus in (0.0, 0.5, 3.0):
        _, report = qtarget.linear_target_loss(
            drawn(2, 4), drawn(9, 4, seed=1), torch.tensor([0, 1]), Bonus(bonus), **arguments
        )
        assert report.label_weights.tolist() == [1.0, 0.5]
        assert report.residual_weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["rho1", "token_cleaning"])
def test_of_equal_scores_the_first_are_kept(name: str) -> None:
    """500 tokens of one excess: a sort that is not stable shuffles them."""
    count = 500
    known = qtarget.Reference(label_log_probs=torch.zeros(count))
    _, report = qtarget.target_loss(
        torch.zeros(count, 4), torch.zeros(count, dtype=torch.long), qtarget.get_target(name, keep_fraction=0.5),
        reference=known, sequence_ids=torch.zeros(count, dtype=torch.long), return_report=True,
    )  # fmt: skip
    assert report.label_weights.tolist() == [1.0] * 250 + [0.0] * 250


@pytest.mark.parametrize("form", FORMS)
def test_of_an_id_that_is_listed_twice_the_first_counts(form: str) -> None:
    """The second slot holds nonsense; and the loss is that of the reference without it."""
    hidden, weight, labels = drawn(3, 4), drawn(9, 4, seed=1), torch.tensor([0, 1, 2])
    clean = qtarget.token_statistics(drawn(3, 9, seed=2), labels, top_k=3)
    assert clean.topk_ids is not None and clean.topk_log_probs is not None
    order = torch.tensor([2, 0, 1])  # ids need not ascend
    twice = qtarget.Reference(
        label_log_probs=clean.label_log_probs,
        topk_ids=torch.cat([clean.topk_ids[:, order], clean.topk_ids[:, :2]], -1),
        topk_log_probs=torch.cat([clean.topk_log_probs[:, order], torch.full((3, 2), -0.01).double()], -1),
        tail_log_mass=clean.tail_log_mass,
    )
    losses = [
        qtarget.linear_target_loss(hidden, weight, labels, "reverse_kl", teacher=known, **FORMS[form])
        for known in (clean, twice)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("bad", [-1e-6, float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_weights(bad: float) -> None:
    """Refused at a trained token, and nobody looks at a masked one."""
    logits, weights = torch.zeros(3, 4), torch.tensor([1.0, 0.0, bad])
    with pytest.raises(qtarget.core.errors.HyperparameterError, match="finite weights of at least 0"):
        qtarget.target_loss(logits, torch.tensor([0, 1, 2]), "sft", loss_weights=weights)
    loss = qtarget.target_loss(logits, torch.tensor([0, 1, -100]), "sft", loss_weights=weights)
    torch.testing.assert_close(loss, torch.tensor(4.0).log())


@dataclass(frozen=True)
class Confidence(Target):
    """``-log p_y / (1 + H_ref)``."""

    name = "confidence"
    formula = "-log p_y / (1 + H_ref)"
    paper = "test"

    @property
    def needs(self) -> Needs:
        return Needs(reference=frozenset({"entropy"}))

    def losses(self, x: TokenView) -> Terms:
        assert x.reference is not None and x.reference.entropy is not None
        return Terms(label=-x.label_log_probs / (1 + x.reference.entropy))


@pytest.mark.parametrize("form", FORMS)
def test_the_entropy_of_a_frozen_head_that_bans_tokens(form: str) -> None:
    hidden, weight, labels = drawn(3, 4), drawn(9, 4, seed=1), torch.tensor([0, 1, 3])
    bias = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor([2, 5]), -torch.inf)
    frozen = qtarget.FrozenHead(drawn(3, 4, seed=2), drawn(9, 4, seed=3), bias)
    loss = qtarget.linear_target_loss(
        hidden, weight, labels, Confidence(), reference=frozen, reduction="sum", **FORMS[form]
    )
    p = (frozen.hidden @ frozen.lm_head_weight.T + bias).softmax(-1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    nll = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(loss, (nll / (1 + entropy)).sum())


@pytest.mark.parametrize("form", FORMS)
def test_a_tail_beside_the_whole_log_softmax(form: str) -> None:
    """A target that reads whole rows and a sparse reference: gradients at listed ids, in the tail and everywhere."""

    class Both(WholeBonus):
        name = "both"

        @property
        def needs(self) -> Needs:
            return Needs(entropy=True, log_probs=True, reference=frozenset({"distribution"}))

        def losses(self, x: TokenView) -> Terms:
            assert x.on_reference is not None
            return Terms(label=super().losses(x).label, residual=reverse_kl(x.on_reference))

    labels = torch.tensor([0, 1, 3])
    known = qtarget.token_statistics(drawn(3, 9, seed=2), labels, top_k=3)
    assert known.topk_ids is not None and known.topk_log_probs is not None and known.tail_log_mass is not None
    found = []
    for ours in (True, False):
        hidden, weight = drawn(3, 4).requires_grad_(), drawn(9, 4, seed=1).requires_grad_()
        if ours:
            loss = qtarget.linear_target_loss(
                hidden, weight, labels, Both(), reference=known, reduction="sum", **FORMS[form]
            )
        else:
            p = (hidden @ weight.T).softmax(-1)
            listed = p.gather(-1, known.topk_ids)
            live = torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], -1)
            frozen = torch.cat([known.topk_log_probs, known.tail_log_mass[:, None]], -1)
            kl = (live * (live.log() - frozen)).sum()
            loss = kl - p[torch.arange(3), labels].log().sum() + 0.5 * (p * p.log()).sum()
        found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_statistics_from_hidden_states_and_from_logits() -> None:
    hidden, weight, labels = drawn(3, 4), drawn(9, 4, seed=1), torch.tensor([0, 1, 3])
    bias = drawn(9, seed=2)
    for plain, arguments in (
        (hidden @ weight.T, {}),
        (hidden @ weight.T + bias, {"bias": bias}),
        (2 * (hidden @ weight.T), {"logit_scale": 2.0}),
        (3 * torch.tanh(hidden @ weight.T / 3), {"logit_softcap": 3.0}),
    ):
        one = qtarget.token_statistics(plain, labels, top_k=2)
        two = qtarget.token_statistics(hidden=hidden, lm_head_weight=weight, labels=labels, top_k=2, **arguments)
        for name in ("label_log_probs", "entropy", "topk_ids", "topk_log_probs", "tail_log_mass"):
            torch.testing.assert_close(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("name", ["sequence_ids", "label_weights", "loss_weights"])
def test_what_does_not_line_up_with_the_labels(name: str) -> None:
    """As many numbers in another shape would be taken for other tokens'."""
    value = torch.ones(3, 2) if name != "sequence_ids" else torch.ones(3, 2, dtype=torch.long)
    with pytest.raises(qtarget.core.errors.ShapeError, match=rf"{name} has shape \(3, 2\), labels \(2, 3\)"):
        qtarget.target_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.long), "sft", **{name: value})
    with pytest.raises(qtarget.core.errors.ShapeError, match=rf"{name} has shape \(2,\), labels \(2, 3\)"):
        qtarget.target_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.long), "sft", **{name: value[:2, 0]})


@pytest.mark.parametrize("name", ["idft+label_smoothing", "eaft+label_smoothing", "dft+gift", "prior_surprise+sft_kl"])
def test_a_combination_sees_what_either_part_needs(name: str) -> None:
    """One part alone asks for the entropy, the top k, the mean or the reference."""
    weight, base = (qtarget.get_target(part, **({"top_k": 4} if part == "eaft" else {})) for part in name.split("+"))
    logits, labels = drawn(5, 9), torch.tensor([0, 1, 3, 4, 8])
    known = {"reference": qtarget.Reference.from_logits(drawn(5, 9, seed=2), labels)}
    common = {"reduction": "none", "return_report": True, **known}
    _, of_weight = qtarget.target_loss(logits, labels, weight, **common)
    _, of_base = qtarget.target_loss(logits, labels, base, **common)
    for backend in ("dense", "chunked"):
        _, both = qtarget.linear_target_loss(
            torch.eye(5).double(), logits.T.contiguous(), labels, qtarget.Combined(weight, base), backend=backend,
            return_report=True, **known,
        )  # fmt: skip
        torch.testing.assert_close(both.label_weights, of_weight.label_weights * of_base.label_weights)
        torch.testing.assert_close(both.residual_weights, of_base.residual_weights)


def test_a_hyper_parameter_that_is_no_choice() -> None:
    with pytest.raises(
        qtarget.core.errors.HyperparameterError, match="gem: form='cubic'; expected one of linear, logsig"
    ):
        qtarget.get_target("gem", form="cubic")


@pytest.mark.parametrize(
    ("name", "field", "good", "bad"),
    [
        ("asft", "kl_weight", [0, 0.0, 7], [-1e-9]),
        ("distillation", "temperature", [1e-9, 1], [0, 0.0, -1]),
        ("label_smoothing", "smoothing", [0, 1], [-1e-9, 1.0001]),
        ("rho1", "keep_fraction", [1e-9, 1], [0, 1.0001]),
        ("eaft", "top_k", [2], [1]),
    ],
)
def test_hyper_parameters_at_the_edges_of_their_ranges(name: str, field: str, good: list, bad: list) -> None:
    for value in good:
        assert getattr(qtarget.get_target(name, **{field: value}), field) == value
    for value in (*bad, *([] if field == "top_k" else [float("nan"), float("inf"), True])):
        with pytest.raises(qtarget.core.errors.HyperparameterError, match=rf"{name}: {field}=.*; expected a number in"):
            qtarget.get_target(name, **{field: value})
