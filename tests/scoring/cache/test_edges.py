"""What a careless change of the cache would let through: one id, one byte, one row too many."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtarget.core.errors import CacheMismatchError, DataError, HyperparameterError, QTargetError
from qtarget.scoring.cache.columns import expand
from qtarget.scoring.cache.decoded import side_file
from qtarget.scoring.cache.merge import merge_caches
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import check_request, read_row
from qtarget.scoring.cache.schema import Manifest, fingerprint_chat_template, row_checksum, supervised_mask
from qtarget.scoring.cache.verify import check_counts, check_plan, shared_places
from qtarget.scoring.cache.writer import uniforms, write_cache
from qtarget.scoring.sources.local import LocalSource
from tests.scoring.helpers import VOCAB, HashSource, contents, provenance, ragged_rows, tiny_model

ROWS = ragged_rows(11)


def checksums(rows):
    return [row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in rows]


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path / "cache", ROWS, HashSource(3), provenance(3), shard_rows=4)
    return tmp_path / "cache"


# -- ids and positions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_an_id_just_outside_the_vocabulary(tmp_path, wrong):
    fine = {"input_ids": [0, VOCAB - 1], "labels": [-100, VOCAB - 1]}
    assert read_row(fine, 0, VOCAB).positions.tolist() == [1]
    row = {"input_ids": [1, wrong], "labels": [-100, wrong]}
    with pytest.raises(DataError, match=rf"row 2 has token ids from {min(1, wrong)} to {max(1, wrong)}"):
        write_cache(tmp_path / "cache", [fine, row], HashSource(), provenance())
    with pytest.raises(DataError, match=f"row 8 has token ids .* the model knows 0 to {VOCAB - 1}"):
        read_row(row, 7, VOCAB)
    with pytest.raises(DataError, match=f"row 1 has token ids .* the model knows 0 to {VOCAB - 1}"):
        check_request([np.array([1, wrong])], 0, None, None, VOCAB)


def test_the_edges_of_a_request():
    ids = [np.array([0, 1, VOCAB - 1])]
    rows, places = check_request(ids, VOCAB, [0, VOCAB - 1], [np.array([1, 2])], VOCAB)
    assert (rows[0].tolist(), places[0].tolist()) == ([0, 1, VOCAB - 1], [1, 2])
    assert check_request(ids, 0, None, None, VOCAB)[1][0].tolist() == [1, 2]
    for top_k in (-1, VOCAB + 1):
        with pytest.raises(HyperparameterError, match=f"top_k={top_k}; expected 0 to {VOCAB}"):
            check_request(ids, top_k, None, None, VOCAB)
    for candidate in (-1, VOCAB):
        with pytest.raises(HyperparameterError, match=f"expected ids of 0 to {VOCAB - 1}"):
            check_request(ids, 0, [candidate], None, VOCAB)
    for places in ([0, 1], [1, 3], [2, 1], [1, 1]):
        with pytest.raises(DataError, match="expected ascending ones of 1 to 2"):
            check_request(ids, 0, None, [np.array(places)], VOCAB)


# -- files -------------------------------------------------------------------------------------------------------


def test_leftovers_are_no_finished_files(tmp_path, cache):
    """A whole shard under its temporary name is scored all the same, and goes."""
    whole, directory = contents(cache), tmp_path / "stopped"
    directory.mkdir()
    for name in ("plan.json", "shard-00000.json"):
        (directory / name).write_bytes(whole[name])
    leftovers = {"shard-00000.parquet.tmp": whole["shard-00000.parquet"], "shard-00009.json.tmp": b"{}"}
    for name, content in leftovers.items():
        (directory / name).write_bytes(content)
    with pytest.raises(CacheMismatchError, match="unfinished"):
        ReferenceCache.open(directory)
    source = HashSource(3)
    write_cache(directory, ROWS, source, provenance(3), shard_rows=4)
    assert source.scored == checksums(ROWS)
    assert contents(directory) == whole


@pytest.mark.parametrize("field", ["rows", "tokens", "name", "bytes", "blake2b"])
def test_a_receipt_that_says_something_else(cache, field):
    """The shard itself is untouched: its receipt alone is not believed."""
    whole, receipt = contents(cache), cache / "shard-00001.json"
    value = json.loads(receipt.read_text())
    value[field] = value[field][::-1] if isinstance(value[field], str) else value[field] + 1
    receipt.write_text(json.dumps(value))
    source = HashSource(3)
    write_cache(cache, ROWS, source, provenance(3), shard_rows=4)
    assert source.scored == checksums(ROWS[4:8])
    assert contents(cache) == whole


def test_a_shard_without_a_receipt_is_scored_again(cache):
    whole = contents(cache)
    (cache / "shard-00001.json").unlink()
    source = HashSource(3)
    write_cache(cache, ROWS, source, provenance(3), shard_rows=4)
    assert source.scored == checksums(ROWS[4:8])
    assert contents(cache) == whole


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_longer_than_recorded(cache, verify):
    path = cache / "shard-00001.parquet"
    size = path.stat().st_size
    with path.open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(CacheMismatchError, match=f"has {size + 1} bytes, expected {size}"):
        ReferenceCache.open(cache, verify=verify)


def test_a_side_file_longer_than_recorded(cache):
    opened = ReferenceCache.open(cache)
    expected = opened.row(5)
    path = side_file(cache, opened.manifest.shards[1])
    size = path.stat().st_size
    with path.open("ab") as handle:
        handle.write(b"x" * 64)
    found = ReferenceCache.open(cache, verify=False).row(5)
    assert path.stat().st_size == size, "it is made again"
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_rows_keep_their_own_numbers(cache):
    """Looked up in any order, through checksums, every row says what was scored of it."""
    opened, source = ReferenceCache.open(cache), HashSource(3)
    for i in (10, 0, 7, 3, 4, 8, 1):
        (place,) = opened.locate(checksums([ROWS[i]]))
        expected = source.numbers(read_row(ROWS[i], i, VOCAB))
        found = opened.row(place)
        np.testing.assert_array_equal(found["label_log_probs"], expected.label_log_probs)
        np.testing.assert_array_equal(found["topk_ids"], expected.topk_ids)
        np.testing.assert_array_equal(found["topk_log_probs"], expected.topk_log_probs)
        np.testing.assert_array_equal(found["tail_log_mass"], expected.tail_log_mass)
        np.testing.assert_array_equal(found["entropy"], expected.entropy.astype(np.float16))


def test_missing_rows_go_by_the_callers_numbers(cache):
    strangers = ragged_rows(7, seed=5)
    opened = ReferenceCache.open(cache)
    with pytest.raises(CacheMismatchError, match=r"1 of 2 rows are not in the cache .*: rows 42; "):
        opened.locate(checksums([ROWS[0], strangers[0]]), [40, 41])
    with pytest.raises(CacheMismatchError, match=r"7 of 7 rows are not in the cache .*: rows 1, 2, 3, 4, 5, \.\.\.; "):
        opened.locate(checksums(strangers))
    with pytest.raises(CacheMismatchError, match=r"5 of 5 rows are not in the cache .*: rows 1, 2, 3, 4, 5; "):
        opened.locate(checksums(strangers[:5]))


def test_a_manifest_that_counts_otherwise(cache):
    """Its own sums agree, the shards' rows and tokens do not."""
    path = cache / "manifest.json"
    value = json.loads(path.read_text())
    for owner in (value, value["shards"][1]):
        owner["tokens"] += 1
    path.write_text(json.dumps(value))
    with pytest.raises(
        CacheMismatchError, match=rf"holds {value['tokens'] - 1} tokens, its manifest says {value['tokens']}"
    ):
        check_counts(ReferenceCache.open(cache))


@pytest.mark.parametrize("content", ["{", "7", "[" * 100_000])
def test_a_plan_that_cannot_be_read(cache, content):
    opened = ReferenceCache.open(cache)
    check_plan(opened)
    (cache / "plan.json").write_text(content)
    with pytest.raises(CacheMismatchError, match=r"plan.json is unreadable .*score again into another folder"):
        check_plan(opened)


def test_ids_are_compared_at_their_own_tokens():
    """Keys of a token's place and an id must not run into those of the next token: the largest id, and slot for slot."""
    ours, theirs = np.array([[5, 0], [0, 5]]), np.array([[0, 5], [5, 3]])
    here, there, share = shared_places(ours, theirs)
    pairs = {
        (int(a) // 2, int(ours.reshape(-1)[a]), int(b) // 2, int(theirs.reshape(-1)[b])) for a, b in zip(here, there)
    }
    assert pairs == {(0, 0, 0, 0), (0, 5, 0, 5), (1, 5, 1, 5)}
    assert share == 0.75
    assert shared_places(np.array([[0]]), np.array([[-1]]))[2] == 0.0
    assert shared_places(np.array([[6], [-1]]), np.array([[-1], [0]]))[2] == 0.0


def test_draws_of_every_row_are_its_own(tmp_path):
    """Several rows a shard, read in any order: ids and counts as the source drew them."""
    source = LocalSource(tiny_model())
    drawn = provenance(sampled=5, tail_policy="sampled")
    write_cache(tmp_path, ROWS, source, drawn, shard_rows=4)
    opened = ReferenceCache.open(tmp_path)
    for i in (9, 0, 6, 2, 10, 5):
        row = read_row(ROWS[i], i, VOCAB)
        numbers = uniforms(row.checksum, drawn.seed, len(row.positions), 5)
        (scored,) = source.sample([row.input_ids], [numbers], positions=[row.positions])
        expected = expand(scored.samples.sizes, scored.samples.ids, scored.samples.counts)
        found = opened.row(i)
        np.testing.assert_array_equal(found["topk_ids"], expected["topk_ids"])
        np.testing.assert_array_equal(found["topk_log_probs"], expected["topk_log_probs"])
        assert len(found["label_log_probs"]) == len(row.positions)
    check_counts(opened)


def test_a_merge_into_a_folder_yet_to_be_made(tmp_path, cache):
    write_cache(tmp_path / "more", ragged_rows(3, seed=9), HashSource(3), provenance(3))
    merged = merge_caches([cache, tmp_path / "more"], tmp_path / "deep" / "down" / "both")
    assert merged.rows == 14
    assert len(ReferenceCache.open(tmp_path / "deep" / "down" / "both")) == 14


def test_named_templates_in_any_order_are_the_same():
    templates = {"default": "{{ a }}", "tool_use": "{{ b }}"}
    found = fingerprint_chat_template(templates)
    assert found == fingerprint_chat_template(dict(reversed(templates.items())))
    assert found != fingerprint_chat_template({**templates, "tool_use": "{{ c }}"})


@pytest.mark.parametrize("count", [3, 9, 13, 20])
def test_another_number_of_rows_is_told(cache, count):
    """Also where it makes another number of shards."""
    with pytest.raises(CacheMismatchError, match=f"it has 11 distinct rows there and {count} now"):
        write_cache(cache, ragged_rows(count), HashSource(3), provenance(3), shard_rows=4)


# -- anything at all ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzed")
    write_cache(folder, ROWS, HashSource(3), provenance(3), shard_rows=4)
    return folder / "manifest.json", json.loads((folder / "manifest.json").read_text())


def read_or_refuse(path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read = Manifest.read(path.parent)
    except QTargetError:  # anything else fails the test
        return
    assert read.rows == sum(shard.rows for shard in read.shards)
    assert all(re.fullmatch(r"shard-[0-9]{5,}\.parquet", shard.name) for shard in read.shards)


@settings(max_examples=150)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_named_error(manifest, content):
    read_or_refuse(manifest[0], content)


@settings(max_examples=250)
@given(data=st.data())
def test_any_change_of_a_manifest_is_read_or_a_named_error(manifest, data):
    """A field, also of a shard, holds any JSON, is missing, or bytes are flipped somewhere."""
    path, good = manifest
    value = json.loads(json.dumps(good))
    owner = data.draw(st.sampled_from([value, value["shards"][1]]))
    for name in data.draw(st.lists(st.sampled_from(sorted(owner)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            owner[name] = data.draw(JSON)
        else:
            del owner[name]
    content = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(path, bytes(content))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"rows": ' + b"9" * 6000 + b"}", b"\xff\xfe{}", b"null", b"7"])
def test_hostile_manifests_are_named(manifest, content):
    manifest[0].write_bytes(content)
    with pytest.raises(CacheMismatchError):
        Manifest.read(manifest[0].parent)
