"""Samples that a run kept: read, refused, weighed anew by rules written out here, and shown in a browser."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from qtarget.cli.app import app
from qtarget.core.errors import ConfigError, DataError
from qtarget.registry import available_trust_regions, get_target
from qtarget.report.runs.document import compare_runs, read_runs
from qtarget.report.runs.figures import runs_page
from qtarget.report.runs.records import ROLLOUTS_FILE
from qtarget.report.runs.rollouts import (
    check_region,
    completions_of,
    read_rollouts,
    region_weights,
    rollouts_document,
    rollouts_page,
    weighed,
)
from tests.report.hostile import HOSTILE


def sample(count: int = 3, step: int = 1, **more) -> dict:
    columns = {"log_probs": [-1.0] * count, "anchor": [-2.0] * count, "advantages": [0.5] * count,
               "weights": [1.0] * count, "losses": [0.1] * count}  # fmt: skip
    return {"step": step, "age": 0, "prompt": "1+1=", "completion": "abc", "tokens": list("abc")[:count],
            "rewards": {"exact": 0.5}, **columns, **more}  # fmt: skip


WEIGHTS = {
    "policy_gradient": lambda r, pi, mu, a: 1.0,
    "ppo_clip": lambda r, pi, mu, a: float(not ((a > 0 and r > 1.28) or (a < 0 and r < 0.8))),
    "cispo": lambda r, pi, mu, a: min(r, 3.0) / r,
    "dppo_tv": lambda r, pi, mu, a: (
        0.0 if a * (r - 1) > 0 and abs(pi - mu) > 0.2 else min(r, 20.0) / r
    ),
    "dppo_kl": lambda r, pi, mu, a: (
        0.0
        if a * (r - 1) > 0 and mu * math.log(mu / pi) + (1 - mu) * math.log((1 - mu) / (1 - pi)) > 0.05
        else min(r, 20.0) / r
    ),
    "spo": lambda r, pi, mu, a: 1 - math.copysign(1, a * (r - 1)) * abs(r - 1) / 0.2,
    "drpo": lambda r, pi, mu, a: 1 - math.copysign(1, a * (r - 1)) * abs(pi - mu) / 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(available_trust_regions()))
def test_weights_are_those_of_the_rules(name):
    rng = torch.Generator().manual_seed(0)
    pi, mu = (0.001 + 0.998 * torch.rand(200, generator=rng, dtype=torch.float64) ** 2 for _ in range(2))
    given = torch.randn(200, generator=rng, dtype=torch.float64)
    row = {"log_probs": pi.log().tolist(), "anchor": mu.log().tolist(), "advantages": given.tolist()}
    found = region_weights(get_target(name), row)
    for w, p, m, a in zip(found, pi.tolist(), mu.tolist(), given.tolist(), strict=True):
        expected = WEIGHTS[name](p / m, p, m, a)
        assert w == pytest.approx(expected, rel=1e-5, abs=2e-6), (p, m, a)


def test_tokens_without_an_advantage_or_a_ratio_have_no_weight():
    row = {
        "log_probs": [-1.0, None, -1.0, -0.0],
        "anchor": [-1.0, -1.0, None, -0.0],
        "advantages": [0.0, 1.0, 1.0, 1.0],
    }
    assert region_weights(get_target("drpo"), row) == [None, None, None, 1.0]


def test_what_is_no_file_of_samples(tmp_path):
    file = tmp_path / ROLLOUTS_FILE
    with pytest.raises(DataError, match="is not there"):
        read_rollouts(tmp_path)
    file.write_text("")
    with pytest.raises(DataError, match="holds no samples"):
        read_rollouts(tmp_path)
    for row, words in (
        ({"prompt": "a"}, "sample 1: no step, tokens"),
        (sample() | {"weights": [1.0]}, "weights is no list of 3 numbers"),
        (sample() | {"tokens": 5}, "tokens is no list"),
        (sample() | {"anchor": ["x", 1, 2]}, "anchor is no list"),
        ([1], "expected a JSON object"),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=words):
            read_rollouts(tmp_path)
    file.write_text(json.dumps(sample()) + '\n{"step": 2, "pro')  # cut off by a kill
    assert [row["step"] for row in read_rollouts(tmp_path)] == [1]


def test_targets_that_samples_cannot_show():
    for name, kwargs, words in (("sft", {}, "only trust regions"), ("dppo_kl", {"outcomes": "listed"}, "not kept")):
        with pytest.raises(ConfigError, match=words):
            check_region(name, get_target(name, **kwargs))


def test_a_report_shows_some_of_many(tmp_path):
    assert completions_of(tmp_path) == []
    (tmp_path / ROLLOUTS_FILE).write_text("".join(json.dumps(sample(step=i)) + "\n" for i in range(1, 502)))
    found = completions_of(tmp_path)
    assert (len(found), found[0]["step"], found[-1]["step"]) == (200, 1, 501)


def test_the_command(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        sample(log_probs=[-0.05, -2.0, -2.0], anchor=[-3.0, -2.0, -2.0]),
        sample(advantages=[0.0] * 3, weights=[None] * 3),
    ]
    (folder / ROLLOUTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, numbers = tmp_path / "page.html", tmp_path / "page.json"
    arguments = [
        "inspect",
        str(folder),
        "--targets",
        "dppo_tv,spo(eps=0.5)",
        "--output",
        str(page),
        "--json",
        str(numbers),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "dppo_tv: 3 tokens with an advantage, mean weight 0.667, blocked 33.3%, corrective 0.0%" in result.output
    assert page.stat().st_size > 10_000
    found = json.loads(numbers.read_text())
    assert [one["region"] for one in found["summary"]] == ["as trained", "dppo_tv", "spo(eps=0.5)"]
    (folder / ROLLOUTS_FILE).write_text(json.dumps(rows[1]) + "\n")
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "as trained: no token has an advantage" in result.output
    for wrong in (["--mark", "a=b"], ["--learning_rate", "1"], ["--targets", "sft"]):
        refused = CliRunner().invoke(app, ["inspect", str(folder), *wrong])
        assert isinstance(refused.exception, ConfigError) and wrong[0] in str(refused.exception)
    with pytest.raises(ConfigError, match="--output"):
        CliRunner().invoke(
            app, ["inspect", str(folder), "--output", str(folder / ROLLOUTS_FILE)], catch_exceptions=False
        )


def test_the_page_in_a_browser(tmp_path, open_page):
    rows = [
        sample(tokens=[HOSTILE[0], "b", "\u202e"], prompt=HOSTILE[1], weights=[1.0, 0.0, None],
               rewards={HOSTILE[3]: 0.25}, advantages=[0.5, 0.5, None], log_probs=[-1.0, -1.0, None]),
        sample(rewards={"exact": 1.0}, step=2),
    ]  # fmt: skip
    (tmp_path / ROLLOUTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = rollouts_document(tmp_path, {"drpo": get_target("drpo")}, 100)
    path = tmp_path / "page.html"
    path.write_text(rollouts_page(document))
    page = open_page(path)
    tokens = page.locator(".qt-sample").first.locator(".qt-token")
    assert tokens.first.inner_text() == HOSTILE[0]
    assert tokens.nth(2).get_attribute("class") == "qt-token masked"
    assert "blocked" in tokens.nth(1).get_attribute("class")
    tokens.first.hover()
    assert "advantage 0.5, ratio 2.718, weight 1, pull 1.359" in page.locator("#qt-tip").inner_text()
    colours = [tokens.nth(i).evaluate("e => e.style.background") for i in range(2)]
    assert colours[0] != colours[1]
    page.select_option("#completions-colour", "advantage A")
    assert len({tokens.nth(i).evaluate("e => e.style.background") for i in range(2)}) == 1
    page.select_option("#completions-region", "drpo")
    page.select_option("#completions-order", "reward, highest first")
    assert "step 2" in page.locator(".qt-sample").first.inner_text()
    assert page.locator("#summary tbody tr").count() == 2


def test_completions_stand_in_a_report(tmp_path, open_page):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ROLLOUTS_FILE).write_text(json.dumps(sample()) + "\n")
    (folder / "qtarget_log.jsonl").write_text(
        json.dumps({"loss": 0.1, "reward": 0.5, "rollout/age": 0, "step": 1}) + "\n"
    )
    report = compare_runs(read_runs([folder]), [])
    assert report["runs"][0]["completions"] == weighed([sample()], {})
    path = tmp_path / "report.html"
    path.write_text(runs_page(report))
    page = open_page(path)
    assert page.locator("#completions .qt-token").all_inner_texts() == ["a", "b", "c"]
    assert "exact 0.5, advantage 0.5" in page.locator("#completions .qt-sample").inner_text()
