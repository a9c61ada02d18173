"""Every line of the contract: targets that break it and are told so, and all built-in ones, which keep it."""

from __future__ import annotations

import sys
import textwrap
import time

import pytest
import torch

import qtarget
from qtarget import LabelWeight, Needs, Target, Terms
from qtarget.core.errors import ConfigError, ContractError, HyperparameterError, UnknownTargetError
from qtarget.core.reductions import sequence_means
from qtarget.registry import available_targets

COMPOSED = (
    "dft+label_smoothing", "prior_surprise+sft_kl", "rho1+sft", "iw_sft+target_sft", "dft+psft", "eaft+gift",
    "idft+hybrid_distillation", "talr+asft",
)  # fmt: skip


@pytest.mark.parametrize("name", [*available_targets(), *COMPOSED])
def test_built_in_and_combined_targets_keep_it(name):
    qtarget.check_target(qtarget.get_target(name))


@pytest.mark.parametrize(
    "name", ["sft", "dft", "asft", "consensus", "gift", "psft", "target_sft", "dft+label_smoothing"]
)
def test_guarded_targets_keep_it(name):
    qtarget.check_target(qtarget.Guarded(qtarget.get_target(name)))


def test_hyper_parameters_at_their_ends_keep_it():
    for name, keys in (
        ("p_power", {"alpha": 0}), ("gem", {"form": "logsigmoid"}), ("distillation", {"temperature": 2.0}),
        ("consensus", {"caution": 0}), ("hybrid_distillation", {"teacher_weight": 1}), ("eaft", {"top_k": 64}),
        ("inverse_likelihood", {"power": 3.0, "clip": 1e6}),
    ):  # fmt: skip
        qtarget.check_target(qtarget.get_target(name, **keys))


class Weight(LabelWeight):
    name, formula, paper = "mine", "-w log p_y", "ours"

    def label_weights(self, x):
        return x.label_probs


class Loss(Target):
    name, formula, paper = "mine", "?", "ours"

    def losses(self, x):
        return Terms(label=-x.label_log_probs)


def weight(function, **attributes):
    return type("Mine", (Weight,), {"label_weights": lambda self, x: function(x)} | attributes)()


def loss(function, **attributes):
    return type("Mine", (Loss,), {"losses": lambda self, x: function(x)} | attributes)()


def needing(needs):
    return {"needs": property(lambda self: needs)}


def as_it_is(made, **wrong):
    """With values that the tests' type checker would refuse, and nothing refuses for a user."""
    for name, value in wrong.items():
        object.__setattr__(made, name, value)
    return made


WHOLE = needing(Needs(teacher=frozenset({"distribution"}), log_probs=True))
BROKEN = {
    "no name": (weight(lambda x: x.label_probs, name=None), "attributes", "name is None"),
    "no paper": (weight(lambda x: x.label_probs, paper=" "), "attributes", "paper is ' '"),
    "scope": (weight(lambda x: x.label_probs, scope="tokens"), "attributes", "scope is 'tokens'"),
    "flag": (weight(lambda x: x.label_probs, has_residual="no"), "attributes", "has_residual is 'no'"),
    "batch without weights": (loss(lambda x: Terms(label=-x.label_log_probs), scope="batch"), "attributes", "LabelWeight"),
    "method": (weight(lambda x: x.label_probs, needs=lambda self: Needs()), "needs", "write @property"),
    "dictionary": (weight(lambda x: x.label_probs, **needing({"entropy": True})), "needs", "it is a dict"),
    "text": (weight(lambda x: x.label_probs, **needing(as_it_is(Needs(), reference="entropy"))), "needs", "write frozenset"),
    "typo": (weight(lambda x: x.label_probs, **needing(Needs(teacher=frozenset({"logits"})))), "needs", "asks for logits"),
    "top_k": (weight(lambda x: x.label_probs, **needing(as_it_is(Needs(), top_k=True))), "needs", "top_k is True"),
    "raising needs": (weight(lambda x: 0, needs=property(lambda self: 1 / 0)), "needs", "ZeroDivisionError"),
    "entropy": (weight(lambda x: x.entropy.exp()), "runs", "Needs(entropy=True)"),
    "top": (weight(lambda x: x.top_log_probs[:, 0].exp()), "runs", "Needs(top_k=8)"),
    "reference": (weight(lambda x: x.reference.agreement), "runs", "Needs(reference=frozenset({'agreement'}))"),
    "typing error": (weight(lambda x: x.labels_probs), "runs", "no attribute 'labels_probs'"),
    "batch entropy": (
        weight(lambda x: x.entropy.exp(), scope="batch", **needing(Needs(entropy=True))), "runs", "sequence_ids, and no more"),
    "whole vocabulary": (
        loss(lambda x: Terms(residual=-(x.on_teacher.frozen.exp() * x.log_probs).sum(-1)), has_residual=True,
             has_label_term=False, **WHOLE), "runs", "must match"),
    "bare tensor": (loss(lambda x: -x.label_log_probs), "terms", "returned a Tensor"),
    "mean": (loss(lambda x: as_it_is(Terms(), label=-x.label_log_probs.mean())), "terms", "shape ()"),
    "number": (loss(lambda x: as_it_is(Terms(), label=1.0)), "terms", "is a float"),
    "nothing": (loss(lambda x: Terms(), has_label_term=False), "terms", "neither term"),
    "undeclared": (loss(lambda x: Terms(-x.label_log_probs, -x.label_log_probs)), "terms", "set has_residual = True"),
    "missing": (loss(lambda x: Terms(residual=-x.label_log_probs), has_residual=True), "terms", "has_label_term = False"),
    "half": (loss(lambda x: Terms(label=-x.label_log_probs.float())), "dtype", "torch.float64 gave"),
    "wide": (loss(lambda x: Terms(label=-x.label_log_probs.double())), "dtype", "torch.float32 gave"),
    "inverse": (weight(lambda x: 1 / x.label_probs), "finite", "log p_y is -90"),
    "inverse base": (
        weight(lambda x: (-x.reference.label_log_probs).exp(), **needing(Needs(reference=frozenset({"label_log_probs"})))),
        "finite", "frozen model: -90"),
    "not a number": (weight(lambda x: x.label_probs * torch.nan), "finite", "is nan"),
    "cut off": (loss(lambda x: Terms(label=-x.label_log_probs.detach())), "gradient", "do not depend"),
    "live": (weight(lambda x: x.label_log_probs.exp()), "weights", "label_weights carries a gradient"),
    "live loss": (
        loss(lambda x: Terms(label=-x.label_log_probs.exp() * x.label_log_probs)), "weights", "follows the label's probability"),
    "live entropy": (
        loss(lambda x: Terms(label=-x.entropy * x.label_log_probs), **needing(Needs(entropy=True))), "weights", "live entropy"),
    "live residual": (
        loss(lambda x: Terms(-x.label_log_probs, -x.label_log_probs.exp() * x.mean_log_prob), has_residual=True,
             **needing(Needs(mean_log_prob=True))), "weights", "residual term follows"),
    "negative": (weight(lambda x: x.label_probs - 0.5), "weights", "clamp(min=0)"),
    "random": (weight(lambda x: torch.rand_like(x.label_probs)), "repeatable", "no random numbers"),
    "mixing": (weight(lambda x: x.label_probs / x.label_probs.mean()), "scope", 'set scope = "batch"'),
    "mixing sequences": (weight(lambda x: x.label_probs / x.label_probs.max(), scope="sequence"), "scope", "sequence's loss"),
    "made on the CPU": (
        weight(lambda x: x.label_probs * torch.ones(len(x.label_probs), dtype=x.label_probs.dtype)), "device", "mix devices"),
    "moved to the CPU": (loss(lambda x: Terms(label=-x.label_log_probs.cpu())), "device", "is on the CPU"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_named_with_the_next_step(case):
    target, line, words = BROKEN[case]
    with pytest.raises(ContractError) as raised:
        qtarget.check_target(target)
    assert f'breaks the contract, line "{line}":' in str(raised.value)
    assert words in str(raised.value), raised.value
    assert "; expected " in str(raised.value)
    assert isinstance(raised.value, ConfigError)


KEPT = {
    "constant": weight(lambda x: torch.full_like(x.label_probs, 0.5)),
    "threshold": weight(lambda x: torch.where(x.label_probs > 0.1, x.label_probs, torch.tensor(0.1))),
    "moved": weight(lambda x: x.label_probs * torch.ones(len(x.label_probs)).to(x.label_probs)),
    "device": weight(lambda x: x.label_probs * torch.ones(len(x.label_probs), device=x.label_probs.device)),
    "sequence": weight(lambda x: (lambda m, i: m.exp()[i])(*sequence_means(x.label_log_probs, x.sequence_ids)), scope="sequence"),
    "batch": weight(lambda x: x.label_probs / x.label_probs.mean(), scope="batch"),
    "live on purpose": loss(lambda x: Terms(label=-x.label_log_probs.exp()), live_weights=True),
    "sparse": loss(
        lambda x: Terms(residual=-(x.on_teacher.frozen.exp() * x.on_teacher.model).sum(-1)), has_residual=True,
        has_label_term=False, **needing(Needs(teacher=frozenset({"distribution"})))),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_is_right_is_not_refused(case):
    qtarget.check_target(KEPT[case])


def test_the_runs_seed_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(ContractError):
        qtarget.check_target(weight(lambda x: torch.rand_like(x.label_probs)))
    qtarget.check_target(weight(lambda x: x.label_probs.sqrt()))
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_quick_and_imports_no_compiler():
    """Two seconds of imports lie behind torch's meta device and dispatch modes."""
    loaded = set(sys.modules)
    begin = time.perf_counter()
    qtarget.check_target(weight(lambda x: x.label_probs.square()))
    assert time.perf_counter() - begin < 5  # tens of milliseconds; a loaded machine
    assert not {"torch._dynamo", "sympy"} & (set(sys.modules) - loaded)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write ``mine_here.py`` and make it importable."""

    def write(text: str) -> None:
        (tmp_path / "mine_here.py").write_text(
            "from dataclasses import dataclass\nimport qtarget\nfrom qtarget import LabelWeight\n"
            + textwrap.dedent(text)
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mine_here", raising=False)

    return write


GOOD = """
    @dataclass(frozen=True)
    class Mine(LabelWeight):
        power: float = 1.0
        name, formula, paper = "mine", "-p^k log p", "ours"
        def __post_init__(self):
            if self.power > 9:
                raise ValueError("power above 9")
        def label_weights(self, x):
            return x.label_probs ** self.power
    class Bare(LabelWeight):
        floor: float = 0.1
        name, formula, paper = "bare", "-p log p", "ours"
        def label_weights(self, x):
            return x.label_probs
    def plain(logits, labels):
        return logits
    class Unfinished(LabelWeight):
        name, formula, paper = "unfinished", "?", "ours"
    """


def test_get_target_checks_ones_own_and_only_those(module):
    module(GOOD)
    assert qtarget.get_target("mine_here:Mine", power=2.0).power == 2.0
    assert qtarget.get_target("mine_here:Mine+label_smoothing", smoothing=0.2).name == "mine+label_smoothing"
    with pytest.raises(ContractError, match=r'line "finite"'):
        qtarget.get_target("mine_here:Mine+sft", power=-5.0)


@pytest.mark.parametrize(
    ("name", "keys", "error", "words"),
    [
        ("mine_here:Mien", {}, UnknownTargetError, "did you mean mine_here:Mine"),
        ("mine_here:plain", {}, UnknownTargetError, "qtarget lens mine_here:plain"),
        ("mine_here:Unfinished", {}, UnknownTargetError, "it lacks label_weights"),
        ("mine_here.py:Mine", {}, UnknownTargetError, "without .py"),
        ("nowhere_at_all:Mine", {}, UnknownTargetError, "nowhere_at_all.py in the current folder"),
        ("mine_here:Mine", {"powr": 1}, HyperparameterError, "did you mean power"),
        ("mine_here:Mine", {"power": 10}, HyperparameterError, "power above 9"),
        ("mine_here:Bare", {"floor": 0.2}, HyperparameterError, "write @dataclass"),
    ],
)
def test_what_is_wrong_with_the_name_or_its_keys(module, name, keys, error, words):
    module(GOOD)
    with pytest.raises(error, match=words):
        qtarget.get_target(name, **keys)


def test_an_error_names_the_line_of_the_users_file(module):
    module("""
        class Mine(LabelWeight):
            name, formula, paper = "mine", "?", "ours"
            def label_weights(self, x):
                return x.label_probs + "a"
        """)
    with pytest.raises(ContractError, match=r"TypeError.*mine_here.py, line 8"):
        qtarget.get_target("mine_here:Mine")
