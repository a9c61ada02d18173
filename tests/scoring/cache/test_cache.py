from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from qtarget.core.errors import (
    CacheMismatchError,
    ConfigError,
    DataError,
    HyperparameterError,
    IncompatibleError,
    NonFiniteLossError,
)
from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import read_row
from qtarget.scoring.cache.schema import fingerprint_model, row_checksum, supervised_mask
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.local import score_rows
from qtarget.storage.locks import locked
from tests.scoring.helpers import PROCESSES, VOCAB, HashSource, contents, provenance, ragged_rows, tiny_model


def checksums(rows):
    return [row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in rows]


@pytest.fixture
def rows():
    return ragged_rows(11)


@pytest.fixture
def cache(tmp_path, rows):
    write_cache(tmp_path / "cache", rows, HashSource(3), provenance(3), shard_rows=4)
    return tmp_path / "cache"


def test_from_model_to_row(tmp_path, rows, capfd):
    """All the way, against a float64 log-softmax of the plain model."""
    model = tiny_model().train()
    doubled = [*rows, *rows[::-1]]
    manifest = score_rows(
        model,
        doubled,
        tmp_path,
        model_id="tiny",
        tokenizer_fingerprint="tok",
        chat_template_fingerprint="chat",
        top_k=4,
        tail_policy="spread",
        shard_rows=3,
        tokens_per_batch=96,
    )
    assert capfd.readouterr() == ("", ""), "no terminal, no bar"
    assert model.training
    model.eval()
    cache = ReferenceCache.open(tmp_path)
    assert cache.manifest == manifest
    assert (manifest.rows, manifest.dtype, manifest.tail_policy) == (len(rows), "float32", "spread")
    assert manifest.model_fingerprint == fingerprint_model(model)
    assert manifest.versions == tool_versions()
    assert manifest.versions["torch"] == torch.__version__
    where = cache.locate(checksums(doubled))
    assert where[: len(rows)] == list(range(len(rows))) == where[len(rows) :][::-1]
    tokens = 0
    for row, index in zip(doubled, where, strict=True):
        found = cache.row(index)
        with torch.no_grad():
            log_probs = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1).numpy()
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        tokens += len(places)
        here = log_probs[[t - 1 for t in places]]
        expected = [log_probs[t - 1, row["labels"][t]] for t in places]
        np.testing.assert_allclose(found["label_log_probs"], expected, rtol=2**-17, atol=1e-5)
        np.testing.assert_allclose(found["entropy"], -(np.exp(here) * here).sum(-1), rtol=2**-10, atol=1e-5)
        rank = np.argsort(-here, axis=-1)
        np.testing.assert_array_equal(found["topk_ids"], rank[:, :4])
        best = np.take_along_axis(here, rank[:, :4], -1)
        np.testing.assert_allclose(found["topk_log_probs"], best, rtol=2**-10, atol=1e-5)
        mass = np.exp(found["topk_log_probs"].astype(np.float64)).sum(-1) + np.exp(found["tail_log_mass"])
        np.testing.assert_allclose(mass, 1, atol=1e-3)
    assert 2 * manifest.tokens == tokens


def test_rows_come_back_as_written(cache, rows):
    opened, source = ReferenceCache.open(cache), HashSource(3)
    assert opened.has_topk
    assert len(opened) == len(rows)
    for i in np.random.default_rng(0).permutation(len(rows)):
        expected, found = source.numbers(read_row(rows[i], int(i), VOCAB)), opened.row(int(i))
        np.testing.assert_array_equal(found["label_log_probs"], expected.label_log_probs)
        np.testing.assert_array_equal(found["entropy"], expected.entropy.astype(np.float16))
        np.testing.assert_array_equal(found["topk_ids"], expected.topk_ids)
        np.testing.assert_array_equal(found["topk_log_probs"], expected.topk_log_probs)
        np.testing.assert_array_equal(found["tail_log_mass"], expected.tail_log_mass)
        types = {name: str(values.dtype) for name, values in found.items()}
        assert types == {
            "label_log_probs": "float32",
            "entropy": "float16",
            "topk_ids": "int32",
            "topk_log_probs": "float32",
            "tail_log_mass": "float32",
        }


def test_half_precision_is_a_choice(rows, tmp_path):
    """Two thirds of the raw size of an (id, log-prob) pair, each within half a unit in the last place."""
    source = HashSource(3)
    write_cache(tmp_path, rows, source, provenance(3, log_probs_dtype="float16"))
    opened = ReferenceCache.open(tmp_path)
    for i in range(len(rows)):
        expected = source.numbers(read_row(rows[i], i, VOCAB)).topk_log_probs.astype(np.float16)
        np.testing.assert_array_equal(opened.row(i)["topk_log_probs"], expected)
        assert opened.row(i)["topk_log_probs"].dtype == np.float16
        for name in ("label_log_probs", "tail_log_mass"):
            np.testing.assert_allclose(
                opened.row(i)[name], getattr(source.numbers(read_row(rows[i], i, VOCAB)), name), rtol=2**-17
            )


def test_writing_into_a_row_leaves_the_cache_alone(cache):
    opened = ReferenceCache.open(cache)
    before = opened.row(0)["label_log_probs"].copy()
    opened.row(0)["label_log_probs"][:] = 7
    np.testing.assert_array_equal(opened.row(0)["label_log_probs"], before)


def test_without_topk_there_are_two_columns(tmp_path, rows):
    write_cache(tmp_path, rows, HashSource(), provenance())
    opened = ReferenceCache.open(tmp_path)
    assert not opened.has_topk
    assert sorted(opened.row(0)) == ["entropy", "label_log_probs"]


def test_banned_tokens_are_stored_finite(tmp_path):
    source = HashSource(2)
    plain = source.numbers

    def numbers(row):
        scored = plain(row)
        scored.topk_log_probs[:, 1] = -np.inf
        return scored

    source.numbers = numbers
    write_cache(tmp_path, ragged_rows(2), source, provenance(2))
    stored = ReferenceCache.open(tmp_path).row(0)["topk_log_probs"][:, 1].astype(np.float64)
    assert len(stored)
    assert np.isfinite(stored).all()
    assert (np.exp(stored) == 0).all()


@pytest.mark.parametrize("column", ["topk_log_probs", "tail_log_mass"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_top_k_and_tail_that_are_no_numbers_are_refused(tmp_path, column, value):
    source, row = HashSource(2), {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}
    plain = source.numbers

    def numbers(row):
        scored = plain(row)
        getattr(scored, column)[-1] = value
        return scored

    source.numbers = numbers
    with pytest.raises(NonFiniteLossError, match="NaN or infinite at position 3 of row"):
        write_cache(tmp_path, [row], source, provenance(2))


def test_repeated_rows_are_scored_once_and_keep_their_order(tmp_path, rows):
    source = HashSource()
    repeated = [rows[2], rows[0], rows[2], rows[1], rows[0]]
    manifest = write_cache(tmp_path, repeated, source, provenance())
    assert manifest.rows == 3
    assert source.scored == checksums([rows[2], rows[0], rows[1]])
    assert ReferenceCache.open(tmp_path).locate(checksums(repeated)) == [0, 1, 0, 2, 1]


def test_another_mask_is_another_row(tmp_path, rows):
    other = {**rows[0], "labels": [-100] * (len(rows[0]["labels"]) - 1) + [rows[0]["input_ids"][-1]]}
    assert write_cache(tmp_path, [rows[0], other], HashSource(), provenance()).rows == 2


def test_edited_rows_are_named(cache, rows):
    edited = [{**row, "input_ids": [*row["input_ids"][:-1], 60], "labels": row["labels"]} for row in rows[:7]]
    with pytest.raises(CacheMismatchError) as caught:
        ReferenceCache.open(cache).locate(checksums([*rows, *edited]))
    message = str(caught.value)
    assert "7 of 18 rows" in message
    assert "rows 12, 13, 14, 15, 16, ...;" in message
    assert "qtarget score CONFIG.yaml" in message
    assert ReferenceCache.open(cache).locate([]) == []


@pytest.mark.parametrize(
    "wanted",
    [
        {"model_fingerprint": "other"},
        {"tokenizer_fingerprint": "other"},
        {"chat_template_fingerprint": "other"},
        {"vocab_size": 62},
    ],
)
def test_another_model_tokenizer_or_template_is_refused(cache, wanted):
    opened = ReferenceCache.open(cache)
    opened.require()
    opened.require(model_fingerprint="model", tokenizer_fingerprint="tokenizer", vocab_size=VOCAB)
    ((field, value),) = wanted.items()
    found = getattr(opened.manifest, field)
    with pytest.raises(CacheMismatchError, match=f"{field} is {found} in the cache, expected {value}; .*qtarget score"):
        opened.require(**wanted)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message", "logged"),
    [
        (truncate, r"has \d+ bytes, expected \d+", "does not match its receipt"),
        (flip, "has the hash [0-9a-f]{32}, expected [0-9a-f]{32}", "does not match its receipt"),
        (lambda path: path.unlink(), "is missing", ""),
    ],
)
def test_a_damaged_shard_is_refused_and_scored_again_alone(cache, rows, damage, message, logged, caplog):
    whole, path = contents(cache), cache / "shard-00001.parquet"
    damage(path)
    with pytest.raises(CacheMismatchError, match=f"shard-00001.parquet {message}; run the command that wrote it again"):
        ReferenceCache.open(cache)
    source = HashSource(3)
    write_cache(cache, rows, source, provenance(3), shard_rows=4)
    assert source.scored == checksums(rows[4:8])
    assert contents(cache) == whole
    assert logged in caplog.text


def test_a_flip_anywhere_is_seen(cache):
    path = cache / "shard-00002.parquet"
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(CacheMismatchError, match="hash"):
            ReferenceCache.open(cache)


def test_pickling_reopens_and_notices_a_new_cache(cache, rows):
    opened = ReferenceCache.open(cache)
    opened.row(0)
    packed = pickle.dumps(opened)
    assert len(packed) < 5_000
    again = pickle.loads(packed)
    np.testing.assert_array_equal(again.row(5)["topk_ids"], opened.row(5)["topk_ids"])
    assert again.locate(checksums(rows)) == opened.locate(checksums(rows))
    shutil.rmtree(cache)
    write_cache(cache, rows[:3], HashSource(3), provenance(3))
    with pytest.raises(CacheMismatchError, match="written again since it was opened"):
        pickle.loads(packed)


def test_row_numbers_outside_the_cache_are_refused(cache):
    opened = ReferenceCache.open(cache)
    for index in (-1, 11):
        with pytest.raises(IndexError, match=f"row {index} of a cache of 11 rows"):
            opened.row(index)


# -- what the writer refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "row 2 has no labels"),
        ({"input_ids": [1, 2], "labels": [1]}, r"row 2 has input_ids of shape \(2,\) and labels of shape \(1,\)"),
        ({"input_ids": [1, VOCAB], "labels": [1, -100]}, "row 2 has token ids from 1 to 61, the model knows 0 to 60"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 3, -100]}, "row 2, position 1: the label is 3, the input 2"),
    ],
)
def test_unusable_rows_are_named(tmp_path, rows, row, message):
    with pytest.raises(DataError, match=message):
        write_cache(tmp_path, [rows[0], row], HashSource(), provenance())


def test_nothing_to_score_is_refused(tmp_path):
    for rows in ([], [{"input_ids": [5, 6], "labels": [5, -100]}]):
        with pytest.raises(DataError, match=f"none of the {len(rows)} rows has a supervised token"):
            write_cache(tmp_path, rows, HashSource(), provenance())
    with pytest.raises(HyperparameterError, match="shard_rows=0"):
        write_cache(tmp_path, ragged_rows(2), HashSource(), provenance(), shard_rows=0)
    with pytest.raises(IncompatibleError, match="tail_policy 'drop'"):
        score_rows(
            tiny_model(),
            ragged_rows(2),
            tmp_path,
            model_id="tiny",
            tokenizer_fingerprint="t",
            chat_template_fingerprint="c",
            tail_policy="drop",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_fingerprint": "new"}, "model_fingerprint is 'model' there and 'new' now"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' now"),
        ({"versions": {"qtarget": "9"}}, "versions is .*'0'.* there and .*'9'.* now"),
        ({"logit_softcap": 30.0}, "logit_softcap is None there and 30.0 now"),
        ({"shard_rows": 5}, "shard_rows is 4 there and 5 now"),
        ({"rows": ragged_rows(12)}, "11 distinct rows there and 12 now; shard-00002.parquet has other rows"),
        ({"rows": ragged_rows(11)[::-1]}, "shard-00000.parquet has other rows"),
    ],
)
def test_a_folder_begun_with_another_plan_is_refused(cache, rows, changes, message):
    before = contents(cache)
    arguments = {"rows": rows, "shard_rows": 4, "logit_softcap": None, **changes}
    named = {k: arguments.pop(k) for k in list(arguments) if k not in ("rows", "shard_rows", "logit_softcap")}
    with pytest.raises(CacheMismatchError, match=f"{message}.*choose another folder, or delete"):
        write_cache(cache, arguments.pop("rows"), HashSource(3), provenance(3, **named), **arguments)
    assert contents(cache) == before


def test_shards_without_a_readable_plan_are_refused(cache, rows):
    (cache / "plan.json").write_text("{")
    with pytest.raises(CacheMismatchError, match=r"plan.json is unreadable"):
        write_cache(cache, rows, HashSource(3), provenance(3), shard_rows=4)
    (cache / "plan.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"holds shards without a plan\.json"):
        write_cache(cache, rows, HashSource(3), provenance(3), shard_rows=4)


def hold(directory, ready, done):
    with locked(directory):
        ready.set()
        done.wait(30)


def test_two_scorers_on_one_folder(tmp_path, rows):
    ready, done = PROCESSES.Event(), PROCESSES.Event()
    other = PROCESSES.Process(target=hold, args=(tmp_path, ready, done))
    other.start()
    try:
        assert ready.wait(30)
        with pytest.raises(ConfigError, match="another process is writing"):
            write_cache(tmp_path, rows, HashSource(), provenance())
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        done.set()
        other.join()
    write_cache(tmp_path, rows, HashSource(), provenance())


def test_the_core_does_not_import_the_cache():
    code = "import sys, qtarget; print([m for m in ('pyarrow', 'transformers', 'qtarget.scoring') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_source_that_tells_no_entropy_leaves_the_column_out(tmp_path):
    class Quiet(HashSource):
        def score(self, *arguments, **named):
            return [replace(numbers, entropy=None) for numbers in super().score(*arguments, **named)]

    rows = ragged_rows(6)
    for top_k in (0, 3):
        write_cache(tmp_path / f"{top_k}", rows, Quiet(top_k), provenance(top_k), shard_rows=4)
        write_cache(tmp_path / f"told-{top_k}", rows, HashSource(top_k), provenance(top_k), shard_rows=4)
        quiet, told = (ReferenceCache.open(tmp_path / name) for name in (f"{top_k}", f"told-{top_k}"))
        for index in range(len(told)):
            expected = told.row(index)
            expected.pop("entropy")
            assert quiet.row(index).keys() == expected.keys()
            for name, value in quiet.row(index).items():
                np.testing.assert_array_equal(value, expected[name])
