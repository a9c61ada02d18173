"""``qtarget cache``: every command of docs/cache.md, on a model of seconds."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from qtarget.cli.app import app
from qtarget.core.errors import CacheMismatchError, ConfigError, IncompatibleError
from qtarget.scoring import ReferenceCache
from tests import ROOT


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def scored(workspace, tmp_path):
    config = workspace()
    call("score", config, "--top_k", "4", "--output", tmp_path / "cache")
    return config, tmp_path / "cache"


def test_info_tells_what_is_there(scored):
    _, cache = scored
    facts = json.loads(call("cache", "info", cache, "--json"))
    manifest = ReferenceCache.open(cache).manifest
    assert facts["tokens"] == manifest.tokens > 0
    assert (facts["top_k"], facts["shards"], facts["schema_version"]) == (4, 1, 2)
    assert facts["columns"] == ["label_log_probs", "entropy", "topk_ids", "topk_log_probs", "tail_log_mass"]
    files = sum(p.stat().st_size for p in cache.iterdir() if p.is_file())
    assert facts["bytes"] == files
    assert facts["bytes_per_token"] == round(files / manifest.tokens, 2)
    text = call("cache", "info", cache)
    for name in ("model_fingerprint", "tail_policy", "half precision", f"transformers {version('transformers')}"):
        assert name in text
    path = cache / "manifest.json"
    far = "/models/" + "a-long-name" * 20
    path.write_text(path.read_text().replace(json.dumps(manifest.model_id), json.dumps(far)))
    assert far in call("cache", "info", cache), "a path is never cut, however narrow the terminal"


def test_verify_passes_what_is_right_and_fails_what_is_not(scored, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, cache = scored
    assert "every hash and count is right" in call("cache", "verify", cache)
    told = call("cache", "verify", cache, "--model", tiny_model, "--config", config)
    assert float(re.search(r"label_log_probs: (\S+) nats", told)[1]) < 1e-3
    assert "model_fingerprint" not in told
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    for parameter in other.parameters():
        parameter.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    with pytest.raises(CacheMismatchError, match=r"differs from .*label_log_probs by .* expected at most 0.02"):
        call("cache", "verify", cache, "--model", tmp_path / "other", "--config", config)
    with pytest.raises(ConfigError, match="--model and --config go together"):
        call("cache", "verify", cache, "--model", tiny_model)
    with pytest.raises(ConfigError, match="--model nobody/nothing cannot be loaded"):
        call("cache", "verify", cache, "--model", "nobody/nothing", "--config", config)
    with pytest.raises(ConfigError, match="--tokenizer nobody/nothing cannot be loaded"):
        call(
            "cache",
            "import",
            "verl",
            cache,
            "--output",
            tmp_path / "x",
            "--model",
            "t",
            "--tokenizer",
            "nobody/nothing",
        )
    manifest = cache / "manifest.json"
    right = manifest.read_text()
    manifest.write_text(right.replace('"model_fingerprint": "', '"model_fingerprint": "00'))
    with pytest.raises(
        CacheMismatchError, match=r"model_fingerprint is '00.* in plan.json.*delete .*manifest.json and run"
    ):
        call("cache", "verify", cache)
    manifest.unlink()
    call("score", config, "--top_k", "4", "--output", cache)
    assert manifest.read_text() == right
    shard = cache / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    for verb in ("verify", "info"):
        with pytest.raises(CacheMismatchError, match=r"bytes, expected .* run the command that wrote it again"):
            call("cache", verb, cache)


def test_the_rest_is_scored_and_merged(scored, workspace, tmp_path):
    _, cache = scored
    more = workspace(validation_file="held_out.jsonl")
    call("score", more, "--top_k", "4", "--known", cache, "--output", tmp_path / "more")
    assert len(ReferenceCache.open(tmp_path / "more")) == 4
    call("cache", "merge", cache, tmp_path / "more", "--output", tmp_path / "both")
    assert len(ReferenceCache.open(tmp_path / "both")) == 16
    call("cache", "verify", tmp_path / "both")
    call("train", workspace(validation_file="held_out.jsonl", target="asft", reference_cache=str(tmp_path / "both")))


@pytest.mark.parametrize("name", ["axolotl", "verl"])
def test_export_and_import_again(scored, tiny_model, tmp_path, name):
    config, cache = scored
    call("cache", "export", cache, name, "--config", config, "--output", tmp_path / name)
    assert pq.read_table(tmp_path / name).num_rows == 12
    call(
        "cache", "import", name, tmp_path / name, "--output", tmp_path / "back", "--model", "teacher",
        "--tokenizer", tiny_model, "--shift", "0" if name == "axolotl" else "1",
    )  # fmt: skip
    ours, back = ReferenceCache.open(cache), ReferenceCache.open(tmp_path / "back")
    assert back.checksums() == ours.checksums()
    assert back.manifest.engine == f"imported from {name}"


def test_a_sampled_cache_trains_distillation_and_refuses_target_sft(workspace, tiny_model, tmp_path):
    keys = {"teacher_model_name_or_path": str(tiny_model), "teacher_cache": str(tmp_path / "drawn")}
    assert "50 draws" in call("score", workspace(**keys), "--role", "teacher", "--sampled", "50")
    call("train", workspace(**keys, target="distillation"))
    call(
        "train",
        workspace(**keys, target="distillation", packing=True, max_length=64, output_dir=str(tmp_path / "packed")),
    )
    with pytest.raises(IncompatibleError, match="'target_sft' is not linear in the teacher"):
        call("train", workspace(**keys, target="target_sft", output_dir=str(tmp_path / "refused")))


def test_an_imported_cache_without_label_log_probs_is_refused_where_they_are_needed(
    scored, tiny_model, tmp_path, workspace
):
    config, cache = scored
    call("cache", "export", cache, "verl", "--config", config, "--output", tmp_path / "verl")
    call(
        "cache", "import", "verl", tmp_path / "verl", "--output", tmp_path / "back", "--model", str(tiny_model),
        "--tokenizer", tiny_model, "--shift", "1",
    )  # fmt: skip
    from qtarget.core.errors import MissingStatisticError

    named = {"reference_cache": str(tmp_path / "back"), "reference_model_name_or_path": str(tiny_model)}
    with pytest.raises(
        MissingStatisticError, match=r"reference.label_log_probs.*holds topk_ids, topk_log_probs, tail_log_mass only"
    ):
        call("train", workspace(target="prior_surprise", **named))


def test_small_benchmarks_tell_what_they_say(tmp_path):
    call(
        "bench", "cache", "--rows", "4", "--length", "16", "--tokens", "64", "--vocab", "512", "--threads", "1",
        "--output", tmp_path / "c.json",
    )  # fmt: skip
    real = json.loads((tmp_path / "c.json").read_text())["real"]["modes"]
    kls = [real[f"top {k}"]["kl"] for k in (1, 4, 8, 16, 32, 64, 128)]
    assert kls == sorted(kls, reverse=True)
    errors = [real[f"top {k}"]["gradient_error"]["distillation"]["token"] for k in (1, 8, 128)]
    assert errors == sorted(errors, reverse=True)
    assert "target_sft" not in real["50 draws"]["gradient_error"]
    call(
        "bench", "reading", "--rows", "500", "--length", "16", "--layers", "1", "--rounds", "1", "--threads", "1",
        "--output", tmp_path / "r.json",
    )  # fmt: skip
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["ratio"] == pytest.approx(results["seconds"]["reading"][0] / results["seconds"]["step"][0])


def test_every_command_of_the_page_is_a_command():
    """The ones above run them; here the page's own lines are checked against the program's options."""
    text = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line.partition("#")[0])
        assert words[0] == "qtarget", line
        verb = words[1:3] if words[1] in ("cache", "bench") else words[1:2]
        told = call(*verb, "--help")
        for option in (word for word in words if word.startswith("--")):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", told), f"{option} in {line}"


def test_the_page_quotes_the_raw_results():
    text = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")
    for name in ("cache_base", "cache_tinystories"):
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for mode, row in results["real"]["modes"].items():
            if "gradient_error" not in row:
                continue
            found = re.search(rf"^\| {re.escape(mode)} \|.*\| {row['bytes_per_token']:.1f} \|", text, re.M)
            assert found, f"{name}: {mode} {row['bytes_per_token']:.1f}"
