"""The commands of docs/scoring.md, as they stand there: five engines write the same teacher, and all give the same loss."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qtarget.cli.main import run
from qtarget.core.errors import ConfigError, ScoringServerError
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.sources.engines import EngineChoice, detect_engine
from qtarget.scoring.sources.http import Retries
from tests import ROOT
from tests.scoring.sources.servers import FakeSglang, FakeVllm, serving

DOCS = ROOT / "docs" / "scoring.md"


def documented(verb: str) -> list[list[str]]:
    """Arguments of the page's commands of one verb."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(f"qtarget {verb} ")]
    return [shlex.split(line)[1:] for line in lines]


def succeed(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    assert ended.value.code == 0, arguments


@pytest.fixture(scope="module")
def teacher(tiny_model, tmp_path_factory) -> Path:
    """Another random model with the student's tokenizer."""
    path = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_model)
    config.initializer_range = 0.5
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def servers(teacher):
    """URLs of fake servers of the teacher, and what they were asked."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    engines = {"8000": FakeVllm(model, tokenizer), "30000": FakeSglang(model, tokenizer)}
    engines["8000"].max_logprobs = 16
    with serving(engines["8000"]) as vllm, serving(engines["30000"]) as sglang:
        yield {"8000": vllm, "30000": sglang}, engines


@pytest.fixture
def folder(workspace, tmp_path, tiny_model, teacher, monkeypatch):
    """The page's ``run.yaml``, with what a test needs beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").symlink_to(tiny_model)
    (tmp_path / "teacher").symlink_to(teacher)
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL).group(1))
    workspace(**shown)
    return tmp_path


def pointed(arguments: list[str], urls: dict[str, str]) -> list[str]:
    """The command with the ports of servers that run."""
    return [urls[a.rsplit(":", 1)[1]] if a.startswith("http") else a for a in arguments]


def trained_losses(folder: Path, cache: str, number: int) -> list[float]:
    """The page's training command with another cache."""
    (command,) = (c for c in documented("train") if "from-local" in c)
    out = folder / f"out-{number}"
    succeed([cache if a == "from-local" else a for a in command] + ["--output_dir", str(out), "--max_steps", "2"])
    summary = json.loads((out / "train_summary.json").read_text())
    return [summary["first_loss"], summary["last_loss"]]


def test_every_server_and_this_process_agree(folder, servers):
    urls, _ = servers
    commands = [c for c in documented("score") if "ray" not in c and "mosec" not in c]
    assert len(commands) == 3
    losses, manifests = [], []
    for number, command in enumerate(commands):
        succeed(pointed(command, urls))
        cache = command[command.index("--output") + 1]
        manifests.append(ReferenceCache.open(folder / cache).manifest)
        losses.append(trained_losses(folder, cache, number))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][0] != losses[0][1]
    assert [m.engine for m in manifests] == ["transformers", "vllm", "sglang"]
    assert [m.engine_version for m in manifests][1:] == ["0.20.2", "0.5.3"]
    assert [m.dtype for m in manifests] == ["float32", "unknown", "float32"]
    assert len({m.model_fingerprint for m in manifests}) == 1


@pytest.mark.slow
@pytest.mark.nightly
def test_five_engines_one_loss(folder, teacher, servers):
    """Also a cluster, by its address, and `qtarget serve`."""
    pytest.importorskip("mosec")
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    from tests.serving.helpers import running

    urls, _ = servers
    commands = {c[c.index("--output") + 1]: c for c in documented("score")}
    assert len(commands) == 6
    told = ray.init(num_cpus=3, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    try:
        for name in ("from-ray", "from-cluster"):
            succeed([told.address_info["address"] if a == "10.0.0.1:6379" else a for a in commands[name]])
    finally:
        ray.shutdown()
    serve = [sys.executable, "-m", "qtarget.cli.main", "serve", str(teacher), "--port", "0"]
    with running(serve) as server:
        succeed(pointed(commands["from-mosec"], {"8100": server.url}))
    for name in ("from-local", "from-vllm", "from-sglang"):
        succeed(pointed(commands[name], urls))
    losses = {name: trained_losses(folder, name, number) for number, name in enumerate(commands)}
    for name, values in losses.items():
        assert values == pytest.approx(losses["from-local"], rel=1e-4), name
    engines = {name: ReferenceCache.open(folder / name).manifest.engine for name in commands}
    assert len(set(engines.values())) == 4  # Ray runs the local engine in its workers
    for shard in (folder / "from-local").glob("shard-*.parquet"):
        assert (folder / "from-ray" / shard.name).read_bytes() == shard.read_bytes()


def test_a_teacher_behind_a_url_is_asked_once(folder, servers, caplog):
    urls, engines = servers
    (command,) = (c for c in documented("train") if any(a.startswith("http") for a in c))
    asked = engines["8000"].asked
    asked.clear()
    succeed([*pointed(command, urls), "--teacher_model_name_or_path", "teacher", "--max_steps", "9"])
    assert "asked once for all rows: its numbers go to out/teacher_cache" in caplog.text.replace(f"{folder}/", "")
    sent = [tuple(body["prompt"]) for path, body in asked if path == "/v1/completions"]
    assert len(sent) == 12 + 1  # the rows and the canary, in three epochs
    named = Path(ReferenceCache.open(folder / "out" / "teacher_cache").manifest.model_id)
    assert named == (folder / "teacher").resolve()
    summary = json.loads((folder / "out" / "train_summary.json").read_text())
    for port in ("8000", "30000"):
        live = ["train", "run.yaml", "--target", "distillation", "--teacher_model_name_or_path", "null"]
        out = ["--teacher", urls[port], "--teacher_top_k", "16", "--max_steps", "9", "--output_dir", f"trusted-{port}"]
        succeed([*live, *out])
        trusted = ReferenceCache.open(folder / f"trusted-{port}" / "teacher_cache").manifest
        assert trusted.model_fingerprint == "unverified: tiny"
        other = json.loads((folder / f"trusted-{port}" / "train_summary.json").read_text())
        assert other["last_loss"] == pytest.approx(summary["last_loss"], rel=1e-4)
    asked.clear()
    succeed(["train", "run.yaml", "--target", "dft", "--teacher", urls["8000"], "--output_dir", "untaught"])
    assert asked == []  # the target needs no teacher


def test_a_finished_cache_of_a_url_is_enough(folder, teacher, caplog, capsys, monkeypatch):
    """Trained once; then the server is gone. Damage, or another choice, needs it again, and says so."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    with serving(FakeVllm(model, tokenizer)) as url:
        command = ["train", "run.yaml", "--target", "distillation", "--max_steps", "2", "--teacher", url]
        succeed([*command, "--teacher_top_k", "4", "--output_dir", "first"])
    first = json.loads((folder / "first" / "train_summary.json").read_text())
    shutil.copytree(folder / "first" / "teacher_cache", folder / "again" / "teacher_cache")
    succeed([*command, "--teacher_top_k", "4", "--output_dir", "again"])
    assert f"is finished; {url} is not asked again" in caplog.text
    assert json.loads((folder / "again" / "train_summary.json").read_text())["last_loss"] == first["last_loss"]

    monkeypatch.setattr(Retries, "wait", lambda *_: None)
    for name, top_k, kept in (("more", "5", None), ("damaged", "4", -1)):
        cache = folder / name / "teacher_cache"
        shutil.copytree(folder / "first" / "teacher_cache", cache)
        (cache / "shard-00000.parquet").write_bytes((cache / "shard-00000.parquet").read_bytes()[:kept])
        with pytest.raises(SystemExit) as ended:
            run([*command, "--teacher_top_k", top_k, "--output_dir", name])
        assert ended.value.code == 2
        assert "see that the server runs" in capsys.readouterr().err
    assert f"asking {url} again" in caplog.text


def test_a_key_signs_what_a_url_said_and_checks_it_when_the_run_goes_on(folder, servers, capsys):
    urls, engines = servers
    (folder / "key").write_text("k" * 64)
    command = ["train", "run.yaml", "--target", "distillation", "--max_steps", "2", "--teacher", urls["8000"]]
    command += [
        "--cache_verify_key",
        str(folder / "key"),
        "--output_dir",
        "signed",
        "--resume",
        "true",
        "--teacher_top_k",
        "4",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    succeed(command)
    cache = folder / "signed" / "teacher_cache"
    ReferenceCache.open(cache, key=b"k" * 64)
    engines["8000"].asked.clear()
    succeed(command)
    assert engines["8000"].asked == []
    (cache / "manifest.sig").unlink()
    with pytest.raises(SystemExit) as ended:
        run(command)
    assert ended.value.code == 2
    assert "teacher_cache is not signed (no manifest.sig)" in capsys.readouterr().err


def test_a_server_of_another_model_is_refused(folder, servers, capsys):
    urls, _ = servers
    command = pointed(next(c for c in documented("score") if "vllm" in c), urls)
    with pytest.raises(SystemExit) as ended:
        run([*command, "--teacher_model_name_or_path", "student"])
    assert ended.value.code == 2
    assert "the vllm server is not" in capsys.readouterr().err
    assert not (folder / "from-vllm" / "plan.json").exists()


def test_choices_that_make_no_sense(servers):
    urls, _ = servers
    with pytest.raises(ConfigError, match="do not go together"):
        EngineChoice("vllm")
    with pytest.raises(ConfigError, match="do not go together"):
        EngineChoice("local", url="http://host")
    with pytest.raises(ConfigError, match="expected one of local, ray"):
        EngineChoice("tgi")  # pyright: ignore[reportArgumentType]
    assert detect_engine(urls["8000"]) == "vllm"
    engine = FakeVllm(None)
    engine.get = lambda path: {"data": [{"owned_by": "somebody"}]}
    with serving(engine) as url, pytest.raises(ScoringServerError, match="a server of 'somebody'"):
        detect_engine(url)
