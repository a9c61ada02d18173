"""The same runs as TRL's own ``GRPOTrainer``, step by step: losses, gradient norms, entropies."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from tests.integrations.conftest import make_model
from tests.integrations.rl.conftest import gradient_norms, trained

RULES = {
    # TRL's words for the same rule; with these clips its minimum is the plain product
    "policy_gradient": ({}, {"loss_type": "dapo", "epsilon": 1.0, "epsilon_high": 1e6}),
    "ppo_clip": ({}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "cispo": ({"trust_region_kwargs": {"max_ratio": 1.2}}, {"loss_type": "cispo", "epsilon_high": 1.2}),
}
POLICIES = {
    "on_policy": {"max_steps": 20},
    "off_policy": {"max_steps": 20, "steps_per_generation": 2, "num_iterations": 2, "learning_rate": 5e-3},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
def test_twenty_steps_are_trls(rule, policy, ours, theirs):
    own, trl = RULES[rule]
    a = trained(ours(rule, **own, **POLICIES[policy]))
    b = trained(theirs(**trl, **POLICIES[policy]))
    assert len(a.losses) == 20
    assert max(gradient_norms(b)) > 0.05, "the run is too weak to tell"
    torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), rtol=0, atol=1e-6)
    # float32 keeps seven digits: a norm of 0.7 was seen to differ by 1.07e-6, and in float64 by less than 1e-12, see below
    torch.testing.assert_close(torch.tensor(gradient_norms(a)), torch.tensor(gradient_norms(b)), rtol=1e-5, atol=1e-6)
    for key in ("entropy", "reward", "completions/mean_length"):
        mine, other = ([line[key] for line in t.state.log_history if key in line] for t in (a, b))
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=1e-5, atol=1e-6)
    if policy == "off_policy":
        ratios = [line["ratio/max"] for line in a.state.log_history if "ratio/max" in line]
        assert max(ratios) > 1.2, "never off-policy"


@pytest.fixture
def in_float64(monkeypatch):
    """TRL's head, and Llama's norms, in float64: both compute in float32 whatever the model is in."""
    import trl.kernels.chunked_logprob as theirs
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from trl.trainer import utils

    text = Path(theirs.__file__).read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    module = types.ModuleType(theirs.__name__)
    module.__dict__.update(__package__=theirs.__package__, __file__=theirs.__file__)
    exec(compile(text, theirs.__file__, "exec"), module.__dict__)
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", module.ChunkedLogProbFunction)

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.mark.parametrize(
    "rule", ["policy_gradient", *(pytest.param(r, marks=pytest.mark.nightly) for r in list(RULES)[1:])]
)
def test_what_differs_in_float32_is_rounding(rule, ours, theirs, in_float64):
    """Off-policy, in float64: the same runs, to within what float64 rounds, losses, gradient norms and weights."""
    own, trl = RULES[rule]
    a = trained(ours(rule, model=make_model().double(), **own, **POLICIES["off_policy"]))
    b = trained(theirs(model=make_model().double(), **trl, **POLICIES["off_policy"]))
    pairs = [(a.losses, b.losses), (gradient_norms(a), gradient_norms(b))]
    for mine, other in pairs:
        torch.testing.assert_close(*(torch.tensor(v, dtype=torch.double) for v in (mine, other)), rtol=0, atol=TINY)
    for mine, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=TINY)


TINY = 1e-12


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_averages_are_trls(loss_type, ours, theirs):
    """With accumulation over two micro-batches of unequal lengths."""
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "max_steps": 3}
    a = trained(ours("ppo_clip", **settings))
    b = trained(theirs(epsilon=0.2, epsilon_high=0.28, **settings))
    torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(gradient_norms(a)), torch.tensor(gradient_norms(b)), rtol=1e-5, atol=1e-6)


def test_without_age_all_rules_are_one_run_to_the_bit(ours):
    import qtarget

    runs = {}
    for rule in qtarget.available_trust_regions():
        trainer = trained(ours(rule, max_steps=3))
        runs[rule] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    first = runs.pop("policy_gradient")
    assert all(torch.equal(first, other) for other in runs.values())
    start = torch.cat([p.detach().flatten() for p in make_model().parameters()])
    assert not torch.equal(first, start)
