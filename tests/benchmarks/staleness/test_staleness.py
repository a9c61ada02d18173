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
from qtarget.benchmarks.staleness.results import finding, staleness_figure, staleness_table
from qtarget.benchmarks.staleness.rules import GRIDS, rule
from qtarget.benchmarks.staleness.runs import Job, Point, StalenessWorker
from qtarget.benchmarks.staleness.toy import along, make_policy, pretrained, prompts, sample, success
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError
from qtarget.registry import available_trust_regions

SMALL = replace(QUICK, points=(Point(), Point(2, 2, 0.1)), rules=("policy_gradient", "dppo_tv"), rounds=3, seeds=2,
                sft_steps=110, workers=1)  # fmt: skip


def test_success_is_the_mass_of_the_right_answer():
    """Against all 10,000 answers of one prompt, and against sampling."""
    policy, asked = pretrained(0, 110), torch.tensor([[3, 1, 4, 1]])
    answers = torch.tensor(list(itertools.product(range(10), repeat=4)))
    log_probs = policy(along(asked.expand(len(answers), -1), answers)).log_softmax(-1)
    mass = log_probs.gather(-1, answers[..., None])[..., 0].sum(-1).exp()
    assert float(mass.sum()) == pytest.approx(1, abs=1e-4)
    drawn = sample(policy, asked.expand(4000, -1), 0.0, torch.Generator().manual_seed(1))
    right = float(mass[[i for i, a in enumerate(answers.tolist()) if a == [1, 1, 3, 4]]].sum())
    assert float(drawn.rewards.mean()) == pytest.approx(right, abs=0.03)
    assert 0.02 < success(policy) < 0.98
    assert success(make_policy(0)) < 0.01


def test_the_sampler_tells_its_own_log_probs():
    policy, asked = pretrained(0, 40), prompts(500, torch.Generator().manual_seed(3))
    exact = sample(policy, asked, 0.0, torch.Generator().manual_seed(4))
    again = policy(along(asked, exact.digits)).log_softmax(-1).gather(-1, exact.digits[..., None])[..., 0]
    torch.testing.assert_close(again.detach(), exact.log_probs)
    noisy = sample(policy, asked, 0.3, torch.Generator().manual_seed(4))
    live = policy(along(asked, noisy.digits)).log_softmax(-1).gather(-1, noisy.digits[..., None])[..., 0]
    assert float((live - noisy.log_probs).abs().mean()) > 0.05


def test_lag_is_counted_in_rounds(monkeypatch):
    """Weights of ``lag`` rounds ago sample: seen from the first layer's bias, which training moves."""
    seen, begun = [], []
    plain = runs.sample

    def watch(policy, *rest):
        seen.append(policy[0].bias.detach().clone())
        return plain(policy, *rest)

    monkeypatch.setattr(runs, "sample", watch)
    worker = StalenessWorker(5, 110)
    for lag in (0, 2):
        seen.clear()
        worker(Job(Point(lag=lag), "policy_gradient", float("inf"), 3e-3, 0))
        begun.append([torch.equal(a, b) for a, b in itertools.pairwise(seen)])
    assert begun == [[False] * 4, [True, True, False, False]]  # the start samples until there is something older


def test_every_rule_has_a_grid_and_learns_on_fresh_samples():
    assert set(GRIDS) == set(available_trust_regions())
    worker = StalenessWorker(20, 110)
    ends = {name: worker(Job(Point(), name, GRIDS[name][-1], 3e-3, 1)) for name in GRIDS}
    assert all(run["end"] > run["start"] + 0.02 for run in ends.values()), ends
    assert ends["policy_gradient"]["blocked"] == 0
    assert rule("drpo", 0.5).name == "drpo"


def test_a_stopped_bench_goes_on(tmp_path):
    output, told = tmp_path / "s.json", []
    whole = run_staleness(SMALL, tmp_path / "whole.json", resume=False, progress=lambda *a: told.append(a))
    assert told[-1][:2] == (8, 8)
    log = (tmp_path / "whole.runs.jsonl").read_text().splitlines()
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
    assert len(staleness_figure(again).axes) >= 2


def test_rates_are_tuned_on_their_own_seeds(tmp_path):
    config = replace(SMALL, points=(Point(),), learning_rates=(1e-6, 3e-3), tuning_seeds=1, rounds=8)
    results = run_staleness(config, tmp_path / "s.json", resume=False, progress=lambda *a: None)
    assert set(results["points"][0]["learning_rates"].values()) == {3e-3}
    seeds = {
        int(json.loads(line)["key"].split("/")[-1]) for line in (tmp_path / "s.runs.jsonl").read_text().splitlines()
    }
    assert seeds == {0, 1, 1000}
    assert config.runs() == 8


def test_a_finding_needs_an_interval_above_zero():
    def row(low: float) -> dict:
        gain = {"mean": 5.0, "low": low, "high": 9.0}
        setting = {"success_percent": {"mean": 70.0}, "to_no_region_points": gain}
        return {
            "lag": 4,
            "epochs": 1,
            "mismatch": 0.0,
            "settings": {"policy_gradient inf": setting, "spo 0.5": setting},
        }

    assert finding([row(1.0)]) == "Ahead of no region: spo 0.5 at lag 4, 1 epoch, mismatch 0 (+5.0 points)"
    assert finding([row(-1.0)]) == "Nothing is for certain ahead of no region at lag 4, 1 epoch, mismatch 0"


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("qtarget.benchmarks.staleness.bench.QUICK", SMALL)
    options = ["bench", "staleness", "--quick", "--workers", "1", "--output", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "region" in result.output
    assert (tmp_path / "s.png").stat().st_size > 10_000
    with pytest.raises(ConfigError, match="no grid"):
        StalenessConfig(rules=("dft",))
