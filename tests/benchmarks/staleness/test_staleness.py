"""`bench staleness`: the toy's success is exact, its age and noise are what they say, and runs go on where they stopped."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from qtarget.benchmarks.staleness import runs
from qtarget.benchmarks.staleness.bench import QUICK, StalenessConfig, run_staleness
from qtarget.benchmarks.staleness.penalties import WHOLE
from qtarget.benchmarks.staleness.results import (
    finding,
    penalties_table,
    rules_of,
    rules_table,
    staleness_figure,
    staleness_table,
)
from qtarget.benchmarks.staleness.rules import GRIDS, rule
from qtarget.benchmarks.staleness.runs import Job, Point, StalenessWorker
from qtarget.benchmarks.staleness.toy import SideBySide, along, make_policy, pretrained, prompts, sample, success
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError
from qtarget.registry import available_trust_regions

SMALL = replace(QUICK, points=(Point(), Point(2, 2, 0.1)), rules=("policy_gradient", "dppo_tv"), rounds=3, seeds=2,
                sft_steps=110, workers=1, penalty_lags=(1,))  # fmt: skip


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_success_is_the_mass_of_the_right_answer():
    """Against all 10,000 answers of one prompt, and against sampling; each of two seeds by itself."""
    policies, asked = [pretrained(0, 110), pretrained(1, 60)], torch.tensor([[3, 1, 4, 1]])
    both = SideBySide(policies)
    answers = torch.tensor(list(itertools.product(range(10), repeat=4)))
    drawn = sample(both, asked.expand(2, 4000, -1), 0.0, generators(1, 2))
    found = success(both, 2)
    for i, policy in enumerate(policies):
        log_probs = policy(along(asked.expand(len(answers), -1), answers)).log_softmax(-1)
        mass = log_probs.gather(-1, answers[..., None])[..., 0].sum(-1).exp()
        assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
        right = float(mass[[k for k, a in enumerate(answers.tolist()) if a == [1, 1, 3, 4]]].sum())
        assert float(drawn.rewards[i].mean()) == pytest.approx(right, abs=0.03)
        assert found[i] == pytest.approx(success(SideBySide([policy]), 1)[0], abs=1e-6)
    assert 0.02 < found[0] < 0.98 and found[0] != found[1]
    assert success(SideBySide([make_policy(0)]), 1)[0] < 0.01


def test_the_sampler_tells_its_own_log_probs():
    policy, asked = pretrained(0, 40), prompts(500, torch.Generator().manual_seed(3))
    both = SideBySide([policy, policy])
    exact = sample(both, asked.expand(2, -1, -1), 0.0, generators(4, 5))
    again = policy(along(asked, exact.digits[0])).log_softmax(-1).gather(-1, exact.digits[0][..., None])[..., 0]
    torch.testing.assert_close(again.detach(), exact.log_probs[0])
    assert not torch.equal(exact.digits[0], exact.digits[1])
    noisy = sample(both, asked.expand(2, -1, -1), 0.3, generators(4, 5))
    live = policy(along(asked, noisy.digits[0])).log_softmax(-1).gather(-1, noisy.digits[0][..., None])[..., 0]
    assert float((live - noisy.log_probs[0]).abs().mean()) > 0.05


def test_seeds_side_by_side_do_not_see_each_other():
    """A seed's run among others is its run alone, up to rounding; gradients are clipped each by itself."""
    worker = StalenessWorker(4, 110)
    job = Job(Point(1, 2, 0.1), "dppo_tv", 0.15, 3e-3, (0, 1, 2))
    together = worker(job)["runs"]
    alone = worker(replace(job, seeds=(1,)))["runs"][0]
    assert together[1] == pytest.approx(alone, rel=1e-3, abs=1e-5)
    assert together[0]["end"] != together[1]["end"]


def test_penalties_on_old_samples():
    """The whole vocabulary holds the policy near its start; the sampled k1 lets go of it."""
    worker = StalenessWorker(24, 110)
    free, k1, whole = (
        worker(Job(Point(lag=8), "policy_gradient", float("inf"), 3e-3, (0, 1), name, weight))["runs"]
        for name, weight in ((None, 0.0), ("k1", 0.5), (WHOLE, 0.5))
    )
    assert all(w["kl_to_start"] < f["kl_to_start"] < k["kl_to_start"] for w, f, k in zip(whole, free, k1, strict=True))


def test_lag_is_counted_in_rounds(monkeypatch):
    """Weights of ``lag`` rounds ago sample: seen from the first layer's bias, which training moves."""
    seen, begun = [], []
    plain = runs.sample

    def watch(policy, *rest):
        seen.append(policy.weights["0_bias"].detach().clone())
        return plain(policy, *rest)

    monkeypatch.setattr(runs, "sample", watch)
    worker = StalenessWorker(5, 110)
    for lag in (0, 2):
        seen.clear()
        worker(Job(Point(lag=lag), "policy_gradient", float("inf"), 3e-3, (0,)))
        begun.append([torch.equal(a, b) for a, b in itertools.pairwise(seen)])
    begun = [pairs[:4] for pairs in begun]  # the last draw measures the distance to the start
    assert begun == [[False] * 4, [True, True, False, False]]  # the start samples until there is something older


def test_every_rule_has_a_grid_and_learns_on_fresh_samples():
    assert set(GRIDS) == set(available_trust_regions())
    worker = StalenessWorker(20, 110)
    ends = {name: worker(Job(Point(), name, GRIDS[name][-1], 3e-3, (1,)))["runs"][0] for name in GRIDS}
    assert {len(values) for name, values in GRIDS.items() if name != "policy_gradient"} == {4}
    assert all(run["end"] > run["start"] + 0.02 for run in ends.values()), ends
    assert ends["policy_gradient"]["blocked"] == 0
    assert rule("drpo", 0.5).name == "drpo"


def test_a_stopped_bench_goes_on(tmp_path):
    output, told = tmp_path / "s.json", []
    whole = run_staleness(SMALL, tmp_path / "whole.json", resume=False, progress=lambda *a: told.append(a))
    assert told[-1][:2] == (8, 8)  # two points by two rules, and penalties
    log = (tmp_path / "whole.runs.jsonl").read_text().splitlines()
    assert len(log) == 8
    (tmp_path / "s.runs.jsonl").write_text("\n".join(log[:3]) + "\n" + log[3][:20])  # cut off while it was written
    with pytest.raises(ConfigError, match="--resume"):
        run_staleness(SMALL, output, resume=False, progress=lambda *a: None)
    told.clear()
    again = run_staleness(SMALL, output, resume=True, progress=lambda *a: told.append(a))
    assert len(told) == 5
    assert again["summary"] == whole["summary"]
    with pytest.raises(ConfigError, match="rounds was 3, is 4"):
        run_staleness(replace(SMALL, rounds=4), output, resume=True, progress=lambda *a: None)
    assert "dppo_tv 0.15" in staleness_table(again)
    assert "| dppo_tv |" in rules_table(again) and "full vocabulary 0.2" in penalties_table(again)
    assert len(staleness_figure(again).axes) >= 2


def test_rates_are_tuned_on_their_own_seeds(tmp_path):
    config = replace(SMALL, points=(Point(),), learning_rates=(1e-6, 3e-3), tuning_seeds=1, rounds=8)
    results = run_staleness(config, tmp_path / "s.json", resume=False, progress=lambda *a: None)
    assert set(results["points"][0]["learning_rates"].values()) == {3e-3}
    keys = [json.loads(line)["key"] for line in (tmp_path / "s.runs.jsonl").read_text().splitlines()]
    assert {key.split("/")[-1] for key in keys} == {"0,1", "1000"}
    assert config.jobs() == len(keys) == 10


def test_a_finding_needs_an_interval_above_zero():
    def row(low: float) -> dict:
        gain = {"mean": 5.0, "low": low, "high": 9.0}
        return {"lag": 4, "epochs": 1, "mismatch": 0.0, "rules": {"spo": {"to_no_region_points": gain}}}

    assert finding([row(1.0)]) == "Ahead of no region: spo at lag 4, 1 epoch, mismatch 0 (+5.0 points)"
    assert finding([row(-1.0)]) == "Nothing is for certain ahead of no region at lag 4, 1 epoch, mismatch 0"


def test_a_threshold_is_chosen_on_other_seeds():
    """The best on even seeds is measured on odd ones, and the other way round; by hand."""

    def ends(*values: float) -> list[dict[str, float]]:
        return [{"end": value} for value in values]

    runs = {"spo 1": ends(0.9, 0.1, 0.8, 0.2), "spo 2": ends(0.3, 0.6, 0.4, 0.7)}
    found = rules_of({"policy_gradient inf": ends(0.5, 0.5, 0.5, 0.5), **runs}, ends(0.5, 0.5, 0.5, 0.5))
    assert set(found) == {"spo"}
    # odd seeds choose 2 for the even ones, even seeds choose 1 for the odd ones
    assert found["spo"]["thresholds"] == ["2", "1"]
    assert found["spo"]["to_no_region_points"]["mean"] == pytest.approx((-20 - 40 - 10 - 30) / 4)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("qtarget.benchmarks.staleness.bench.QUICK", SMALL)
    options = ["bench", "staleness", "--quick", "--workers", "1", "--output", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "region" in result.output
    assert (tmp_path / "s.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no grid"):
        StalenessConfig(rules=("dft",))
