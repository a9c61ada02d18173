"""Caches from elsewhere: side files of other numbers, manifests that contradict themselves, signatures."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from qtarget.cli.app import app
from qtarget.core.errors import CacheMismatchError, ConfigError
from qtarget.scoring.cache import decoded
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import MANIFEST, Manifest
from qtarget.scoring.cache.signature import SIGNATURE, check_signature, read_key, sign
from qtarget.scoring.cache.verify import check_counts
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.local import LocalSource
from qtarget.storage.files import digest, digest_file, write_json
from tests.scoring.helpers import provenance, ragged_rows, tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    write_cache(folder, ragged_rows(8), LocalSource(tiny_model()), provenance(3), shard_rows=4)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "cache"))


def numbers(folder: Path) -> list[dict[str, np.ndarray]]:
    opened = ReferenceCache.open(folder)
    return [opened.row(index) for index in range(len(opened))]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        for name, values in one.items():
            np.testing.assert_array_equal(values, other[name])


def poison(folder: Path) -> None:
    """Other label log-probs in every side file, with receipts to match: what hashes alone cannot see."""
    for path in (folder / ".decoded").glob("*.arrow"):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        at = table.column_names.index("label_log_probs")
        lists = table["label_log_probs"].combine_chunks()
        changed = pa.LargeListArray.from_arrays(lists.offsets, pa.array(lists.flatten().to_numpy() - np.float32(5)))
        sink = pa.BufferOutputStream()
        table = table.set_column(at, "label_log_probs", changed)
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
        path.write_bytes(content)
        write_json(path.with_suffix(".json"), {"bytes": len(content), "blake2b": digest(content)})


def edit(folder: Path, **fields) -> None:
    value = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, {**value, **fields})


# -- side files --------------------------------------------------------------------------------------------------


def test_a_poisoned_side_file_is_made_again(cache):
    honest = numbers(cache)
    poison(cache)
    assert_same(numbers(cache), honest)


def test_a_side_file_that_is_no_arrow_file_is_made_again(cache):
    honest = numbers(cache)
    for path in (cache / ".decoded").glob("*.arrow"):
        path.write_bytes(b"ARROW1\0\0" + bytes(1000))
        write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "blake2b": digest_file(path)})
    assert_same(numbers(cache), honest)


def test_verify_decodes_again_where_the_manifest_has_no_digest(cache):
    """A cache of an earlier release is read as it was, and `cache verify` still finds another's side file."""
    honest = numbers(cache)
    shards = json.loads((cache / MANIFEST).read_text())["shards"]
    edit(cache, shards=[{k: v for k, v in shard.items() if k != "decoded"} for shard in shards])
    assert all(shard.decoded == "" for shard in Manifest.read(cache).shards)
    assert_same(numbers(cache), honest)
    poison(cache)
    opened = ReferenceCache.open(cache)
    check_counts(opened)
    assert_same(numbers(cache), honest)


def test_verify_names_a_digest_that_is_another(cache):
    manifest = Manifest.read(cache)
    first = replace(manifest.shards[0], decoded="0" * 32)
    edit(cache, shards=[asdict(shard) for shard in (first, *manifest.shards[1:])])
    with pytest.raises(CacheMismatchError, match=r"shard-00000.parquet decodes to numbers of the hash .*says 0{32}"):
        check_counts(ReferenceCache.open(cache))


def test_a_link_is_no_side_file(cache, tmp_path):
    honest = numbers(cache)
    for path in (cache / ".decoded").glob("*.arrow"):
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    poison_target = {path.name for path in (cache / ".decoded").glob("*.arrow") if path.is_symlink()}
    assert poison_target
    assert_same(numbers(cache), honest)
    assert not any(path.is_symlink() for path in (cache / ".decoded").glob("*.arrow"))


def test_side_files_of_another_owner_are_never_taken(cache, tmp_path, monkeypatch):
    """As seen by another user: what lies there counts for nothing, a folder of one's own is used."""
    honest = numbers(cache)
    poison(cache)
    there = {path.name: path.read_bytes() for path in (cache / ".decoded").iterdir()}
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    real = os.getuid()
    monkeypatch.setattr(decoded, "private_folder", lambda path: mine)
    monkeypatch.setattr(decoded, "is_ours", lambda path, kind: cache not in path.parents and os.path.lexists(path))
    assert_same(numbers(cache), honest)
    assert os.getuid() == real
    assert {path.name: path.read_bytes() for path in (cache / ".decoded").iterdir()} == there
    assert any(mine.glob("*.arrow"))


def test_is_ours(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.touch()
    link = tmp_path / "link"
    link.symlink_to(path)
    assert decoded.is_ours(path, decoded.stat.S_ISREG)
    assert not decoded.is_ours(path, decoded.stat.S_ISDIR)
    assert not decoded.is_ours(link, decoded.stat.S_ISREG)
    assert not decoded.is_ours(tmp_path / "none", decoded.stat.S_ISREG)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    assert not decoded.is_ours(path, decoded.stat.S_ISREG)


# -- meaning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, expected 1.0"),
        ({"alignment": "shifted"}, "alignment is 'shifted', expected causal"),
        ({"log_probs_dtype": "int8"}, "log_probs_dtype is 'int8'"),
        ({"sampled": 50}, "top_k is 3 and sampled is 50"),
        ({"sampled": -1}, "sampled is -1, expected a whole number from 0 to 255"),
        ({"top_k": 0}, "columns are"),
        ({"top_k": 10**9}, "top_k is 1000000000"),
        ({"top_k": True}, "top_k is True"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"columns": ["label_log_probs"]}, "topk_ids"),
        ({"columns": ["label_log_probs", "entropy", "topk_ids", "topk_log_probs", "evil"]}, "columns are"),
        ({"columns": []}, "columns are"),
        ({"versions": 3}, "versions are 3"),
    ],
)
def test_a_manifest_that_means_something_else_is_refused_on_opening(cache, fields, words):
    edit(cache, **fields)
    with pytest.raises(CacheMismatchError, match=words):
        ReferenceCache.open(cache)


def test_columns_that_the_shards_do_not_have_are_named(cache):
    columns = [name for name in Manifest.read(cache).columns if name != "tail_log_mass"]
    edit(cache, columns=columns)
    with pytest.raises(CacheMismatchError, match="differ in the columns tail_log_mass"):
        ReferenceCache.open(cache)


# -- signatures --------------------------------------------------------------------------------------------------


def test_a_top_k_that_the_shards_do_not_have_is_named(cache):
    edit(cache, top_k=9)
    shutil.rmtree(cache / ".decoded", ignore_errors=True)
    with pytest.raises(CacheMismatchError, match="3 ids a token, the manifest says top_k 9"):
        numbers(cache)


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key"
    path.write_text("k" * 64)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_a_signed_cache_that_was_edited_is_refused_by_name(cache, key):
    """Shard, receipt, plan and manifest alike: all hashes agree with one another, and not with the signature."""
    assert "signed" in run("cache", "sign", cache, "--key", key).output
    assert "so is the signature" in run("cache", "verify", cache, "--verify-key", key).output
    other = cache.with_name("other")
    write_cache(other, ragged_rows(8), LocalSource(tiny_model(seed=1)), provenance(3), shard_rows=4)
    for path in other.iterdir():
        if path.is_file():
            shutil.copy(path, cache / path.name)
    run("cache", "verify", cache)  # whole, as far as hashes tell
    with pytest.raises(CacheMismatchError, match=rf"{SIGNATURE} is not the signature of {MANIFEST} with this key"):
        run("cache", "verify", cache, "--verify-key", key)


def test_a_shard_that_was_edited_is_refused_too(cache, key):
    sign(cache, read_key(key))
    path = cache / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    check_signature(cache, read_key(key))  # of the manifest, which has the shard's hash
    with pytest.raises(CacheMismatchError, match=r"shard-00000.parquet has the hash"):
        ReferenceCache.open(cache, key=read_key(key))


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"algorithm": "none", "signature": ""}', '{"algorithm": "hmac-sha256", "signature": "zz"}'],
)
def test_a_signature_that_is_none_is_refused(cache, key, content):
    with pytest.raises(CacheMismatchError, match=r"is not signed.*qtarget cache sign"):
        ReferenceCache.open(cache, key=read_key(key))
    (cache / SIGNATURE).write_text(content)
    with pytest.raises(CacheMismatchError, match=SIGNATURE):
        ReferenceCache.open(cache, key=read_key(key))


def test_another_key_is_refused(cache, key):
    sign(cache, read_key(key))
    with pytest.raises(CacheMismatchError, match="with another key"):
        ReferenceCache.open(cache, key=b"x" * 64)


def test_keys_are_files_of_some_length(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_key(tmp_path / "none")
    (tmp_path / "short").write_text("password\n")
    with pytest.raises(ConfigError, match="holds 8 bytes; expected at least 32"):
        read_key(tmp_path / "short")


def test_resuming_keeps_the_signature(cache, key):
    """The manifest is written again with the same bytes."""
    sign(cache, read_key(key))
    write_cache(cache, ragged_rows(8), LocalSource(tiny_model()), provenance(3), shard_rows=4)
    ReferenceCache.open(cache, key=read_key(key))


def test_training_wants_the_signature_and_the_plan(cache, key):
    """Through the trainer's own door."""
    from qtarget import get_target
    from qtarget.integrations.sft.config import QTargetConfig
    from qtarget.integrations.shared.frozen import open_caches

    target = get_target("prior_surprise")
    args = QTargetConfig(
        output_dir=str(cache.parent / "run"),
        reference_cache=str(cache),
        cache_verify_key=str(key),
        use_cpu=True,
        bf16=False,
    )
    models = {"reference": None, "teacher": None}
    with pytest.raises(CacheMismatchError, match="is not signed"):
        open_caches(args, target, models)
    sign(cache, read_key(key))
    assert set(open_caches(args, target, models)) == {"reference"}
    edit(cache, seed=7)
    with pytest.raises(CacheMismatchError, match="is not the signature"):
        open_caches(args, target, models)
    args.cache_verify_key = None
    with pytest.raises(CacheMismatchError, match=r"was edited: seed is 7 in manifest.json, 0 in plan.json"):
        open_caches(args, target, models)


def test_a_key_file_that_does_not_end_is_refused():
    with pytest.raises(ConfigError, match="the key file /dev/zero cannot be read: more than 64 MiB"):
        read_key("/dev/zero")
