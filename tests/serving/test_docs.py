"""docs/serving.md says what the code does: its commands, its example, its limits and its numbers."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qtarget.benchmarks.scoring.serving import ServingConfig, row_lengths, summarise
from qtarget.cli.app import app
from qtarget.data.embedded import base_model_path
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.scoring.sources.identity import Limits
from qtarget.serving.settings import ServeSettings
from tests import ROOT
from tests.serving.helpers import ENVIRONMENT, running

PAGE = (ROOT / "docs/serving.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files that the page names, and the current folder."""
    for name in ("src/qtarget/data/embedded", "examples"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(command: list[str]):
    """The command as written, but on a free port of this machine."""
    free = [{"8100": "0", "8101": "0", "0.0.0.0": "127.0.0.1"}.get(word, word) for word in command[1:]]
    return running([sys.executable, "-m", "qtarget.cli.main", *free])


@pytest.mark.nightly
def test_commands_run_in_order(folder):
    kinds = [command[:2] for command in COMMANDS]
    assert kinds == [
        ["qtarget", "serve"],
        ["qtarget", "score"],
        ["curl", "http://127.0.0.1:8100/info"],
        ["python", "-c"],
        ["qtarget", "serve"],
        ["qtarget", "bench"],
    ]
    with start(COMMANDS[0]) as server:
        said = re.search(r"^http://127\.0\.0\.1:8100 serves .*$", PAGE, flags=re.MULTILINE)
        assert said is not None
        assert server.line.strip() == said[0].replace("http://127.0.0.1:8100", server.url)
        score_through([word.replace("http://127.0.0.1:8100", server.url) for word in COMMANDS[1]])
        status, kind, body = server.ask("/info")
        assert (status, kind, json.loads(body)["vocab_size"]) == (200, "application/json", 512)
        python = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
        assert python is not None
        scope: dict = {}
        exec(python[1].replace("http://127.0.0.1:8100", server.url), scope)
        assert scope["row"].topk_ids.shape == (3, 2)
        for name in re.findall(r"`(qtarget_\w+)(?:\{\w+\})?`", PAGE):
            assert f"\n# TYPE {name} " in "\n" + server.ask("/metrics")[2].decode()
    with (folder / "token.txt").open("w") as file:
        subprocess.run([sys.executable, *COMMANDS[3][1:3]], stdout=file, check=True)
    assert COMMANDS[3][3:] == [">", "token.txt"]
    with start(COMMANDS[4]) as server:
        assert server.ask("/info")[0] == 401
        token = (folder / "token.txt").read_text().strip()
        assert server.ask("/info", None, Authorization=f"Bearer {token}")[0] == 200


def score_through(command: list[str]) -> None:
    """What the numbers are is tested in test_mosec_source.py; here, that the command makes a whole cache of them."""
    done = CliRunner().invoke(app, [*command[1:], "--max_length", "48"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    cache = ReferenceCache.open("runs/served")
    model = AutoModelForCausalLM.from_pretrained(base_model_path())
    assert cache.manifest.rows > 600
    assert (cache.manifest.engine, cache.manifest.model_fingerprint) == ("qtarget", fingerprint_model(model))


def test_limits_are_the_defaults():
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([0-9]+)(?: s)? \|", PAGE, flags=re.MULTILINE))
    limits, settings = Limits(), ServeSettings("model")
    names = {"body_bytes", "rows", "tokens", "top_k", "candidates", "answer_bytes"}
    expected = {f"max-{name.replace('_', '-')}": getattr(limits, name) for name in names}
    assert {name: int(value) for name, value in rows.items()} == {
        **expected,
        "queue": settings.queue,
        "timeout": settings.timeout,
        "header-timeout": settings.header_timeout,
        "max-connections": settings.max_connections,
    }
    options = {o for p in typer.main.get_command(app).commands["serve"].params for o in p.opts}
    used = {word for command in COMMANDS for word in command}
    assert set(re.findall(r"(?<![!-])--[a-z][a-z_-]*", PAGE)) <= options | used


def test_numbers_are_those_of_the_raw_results():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from update_serving_docs import render
    finally:
        sys.path.pop(0)
    assert render() == PAGE
    results = json.loads((ROOT / "benchmarks/results/serving.json").read_text())
    assert results["config"]["clients"] == 32
    assert (results["config"]["shortest"], results["config"]["longest"]) == (8, 384)
    assert summarise(results["rounds"]) == results["summary"]


@pytest.mark.nightly
def test_the_load_test_runs(folder):
    small = ["--requests", "12", "--rounds", "1", "--clients", "4", "--longest", "64", "--layers", "1"]
    done = CliRunner(env=ENVIRONMENT).invoke(app, [*COMMANDS[5][1:], *small], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    results = json.loads((folder / "runs/serving.json").read_text())
    assert results["config"]["requests"] == 12
    lengths = row_lengths(ServingConfig(**results["config"]))
    assert len(lengths) == 12 and 8 <= lengths.min() <= lengths.max() <= 64
    for name, runs in results["rounds"].items():
        assert len(runs) == 1 and 0 < runs[0]["p50_ms"] <= runs[0]["p99_ms"], name
