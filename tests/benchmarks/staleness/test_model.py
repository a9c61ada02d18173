"""`bench staleness --model`: fresh samples make all rules one run, old ones do not; runs go on where they stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from qtarget.benchmarks.pool import one_thread, quiet_libraries
from qtarget.benchmarks.staleness.bench import run_staleness
from qtarget.benchmarks.staleness.model import ModelWorker
from qtarget.benchmarks.staleness.model_bench import (
    NO_REGION,
    QUICK_MODEL,
    ModelConfig,
    model_finding,
    model_table,
    summarize_model,
)
from qtarget.benchmarks.staleness.runs import Job, Point
from qtarget.cli.app import app
from qtarget.core.errors import ConfigError


@pytest.fixture(scope="module")
def worker():
    with quiet_libraries(), one_thread():
        yield ModelWorker(2, 60, 2, 8, 1)


def without_time(run: dict) -> dict:
    return {key: value for key, value in run.items() if key != "cpu_seconds"}


def test_fresh_samples_make_all_rules_one_run_to_the_bit(worker):
    fresh = [
        worker.run(Job(Point(), name, value, 1e-3, ()), 0) for name, value in ((NO_REGION.split()[0], 1), ("drpo", 0.5))
    ]
    assert without_time(fresh[0]) == without_time(fresh[1])
    assert abs(fresh[0]["kl_k3"]) < 1e-9 and fresh[0]["blocked"] == 0
    reused = [
        worker.run(Job(Point(epochs=3), name, value, 1e-3, ()), 0)
        for name, value in (("ppo_clip", 0.2), ("ppo_clip", 1e-4))
    ]
    assert reused[0]["reward"][0] == reused[1]["reward"][0] == fresh[0]["reward"][0]  # one start, one draw
    assert reused[0]["kl_k3"] > 1e-4 and reused[0]["blocked"] < reused[1]["blocked"]


def test_every_run_is_asked_once_and_the_start_by_none(monkeypatch):
    """Seconds of a run are of what it does itself: the first one of a process is no exception."""
    with quiet_libraries(), one_thread():
        fresh, asked = ModelWorker(1, 1, 1, 2, 1), []
    score = fresh.scores
    monkeypatch.setattr(fresh, "scores", lambda model: asked.append(model) or score(model))
    found = fresh.run(Job(Point(), "drpo", 0.5, 1e-3, ()), 0)
    assert len(asked) == 1 and asked[0] is not fresh.first
    again = fresh.scores(fresh.first)
    assert (found["start"], found["start_greedy"]) == (again["end"], sum(again["right_greedy"]) / 2)


def test_learning_rates_are_judged_on_other_prompts(worker):
    held_out = {row["prompt"] for row in worker.test}
    assert not held_out & {row["prompt"] for row in worker.validation}
    tuning = worker.run(Job(Point(), "drpo", 0.5, 1e-3, ()), 1000)
    assert "right_sampled" not in tuning and 0 <= tuning["end"] <= 1
    with pytest.raises(ConfigError, match="only lag and epochs"):
        worker.run(Job(Point(mismatch=0.1), "drpo", 0.5, 1e-3, ()), 0)


def run(right: list[int], greedy: list[int], draws: int = 2) -> dict:
    return {"end": sum(right) / len(right) / draws, "right_sampled": right, "right_greedy": greedy, "start": 0.5,
            "start_greedy": 0.75, "kl_k3": 0.1, "blocked": 0.25}  # fmt: skip


def test_the_summary_is_of_percent_and_pairs():
    """By hand: two prompts of two draws, two seeds; every pair differs by one draw and no greedy answer."""
    base, other = [run([0, 1], [1, 0]), run([1, 0], [0, 1])], [run([1, 2], [1, 0]), run([2, 1], [0, 1])]
    point = {"lag": 8, "epochs": 4, "learning_rates": {"policy_gradient": 1e-4, "drpo": 2e-4}}
    found = summarize_model([{**point, "runs": {NO_REGION: base, "drpo 0.5": other}}], 2)
    (row,) = found["points"]
    one = row["settings"]["drpo 0.5"]
    assert row["start"] == {"sampled": 50.0, "greedy": 75.0}
    assert row["settings"][NO_REGION]["sampled"]["mean"] == 25 and row["settings"][NO_REGION]["collapsed"] == 2
    assert one["sampled"]["mean"] == 75 and one["collapsed"] == 0
    assert one["sampled_to_no_region"] == {"mean": 50.0, "low": 50.0, "high": 50.0}
    assert one["greedy_to_no_region"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "lag 8, 4 epochs: drpo +50.0" in found["finding"]
    assert "| lag 8, 4 epochs | drpo 0.5 | 0.0002 | 75.0 | 50.0 | +50.0 (+50.0..+50.0) |" in model_table(
        {"summary": found}
    )
    assert "excludes zero" in model_finding([])


@pytest.mark.slow
@pytest.mark.nightly
def test_a_stopped_bench_goes_on(tmp_path):
    small = replace(QUICK_MODEL, workers=1, rounds=2, seeds=1)
    whole = run_staleness(small, tmp_path / "whole.json", resume=False, progress=lambda *a: None)
    log = (tmp_path / "whole.runs.jsonl").read_text().splitlines()
    assert len(log) == small.jobs() == 3
    (tmp_path / "s.runs.jsonl").write_text(log[0] + "\n")
    again = run_staleness(small, tmp_path / "s.json", resume=True, progress=lambda *a: None)
    assert again["summary"]["points"] == whole["summary"]["points"]
    assert json.loads((tmp_path / "s.json").read_text())["benchmark"] == "staleness --model"
    with pytest.raises(ConfigError, match="draws was 1, is 2"):
        run_staleness(replace(small, draws=2), tmp_path / "s.json", resume=True, progress=lambda *a: None)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command(tmp_path):
    options = ["bench", "staleness", "--model", "--quick", "--workers", "1", "--output", str(tmp_path / "s.json")]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "no region" in " ".join(result.output.split())
    assert ModelConfig().jobs() == 104
