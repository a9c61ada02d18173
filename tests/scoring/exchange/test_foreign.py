"""Rows of DistillKit, axolotl and verl: built by hand as those projects lay them out, read, exported, read again."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from qtarget.core.errors import ConfigError, DataError, IncompatibleError
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.exchange import foreign
from qtarget.scoring.exchange.bits import pack_bits, unpack_bits
from qtarget.scoring.exchange.export import export_rows
from qtarget.scoring.exchange.foreign import import_rows
from qtarget.scoring.sources.local import LocalSource
from tests.scoring.helpers import VOCAB, HashSource, provenance, ragged_rows, tiny_model

K = 5


def spoken_rows(count: int, masked: bool = True) -> list[dict[str, list[int]]]:
    """Rows that the tiny model would say itself, so that the observed token is a likely one."""
    model, rng = tiny_model(), np.random.default_rng(0)
    rows = []
    for _ in range(count):
        ids = [int(rng.integers(3, VOCAB))]
        for _ in range(int(rng.integers(6, 16))):
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy()
            ids.append(int(rng.choice(VOCAB, p=p / p.sum())))
        start = int(rng.integers(2, 5)) if masked else 0
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def full_log_probs(ids: list[int]) -> np.ndarray:
    """``[time, vocab]``: what the model says after each token."""
    with torch.no_grad():
        return tiny_model()(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def top(log_probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-log_probs, axis=-1)[:, :K]
    return ids, np.take_along_axis(log_probs, ids, -1)


def axolotl(row, wrong=0):
    """Label rows: blank at 0, then what was said before each token, scaled up to one."""
    ids, values = top(full_log_probs(row["input_ids"]))
    values = values - np.log(np.exp(values).sum(-1, keepdims=True))
    shift = 1 + wrong
    blank_ids, blank = np.tile(np.arange(K), (shift, 1)), np.full((shift, K), -np.inf)
    ids, values = np.concatenate([blank_ids, ids])[: len(ids)], np.concatenate([blank, values])[: len(values)]
    labels = np.roll(row["labels"], wrong)  # a mask lies with its numbers
    mask = np.array([[int(label != -100 and t >= shift)] * K for t, label in enumerate(labels)])
    return {
        **row,
        "target_token_ids": ids.tolist(),
        "target_logprobs": values.tolist(),
        "target_mask": mask.tolist(),
    }


def verl(row):
    """Prediction rows, left- and right-padded."""
    ids, values = top(full_log_probs(row["input_ids"]))
    n, left, right = len(ids), 3, 2
    zeros = [[0] * K]
    response = len(row["labels"]) - row["labels"].count(-100)
    return {
        "input_ids": [0] * left + row["input_ids"] + [0] * right,
        "attention_mask": [0] * left + [1] * n + [0] * right,
        "response_mask": [1] * response + [0] * right,
        "teacher_ids": zeros * left + ids.tolist() + zeros * right,
        "teacher_logprobs": [[0.0] * K] * left + values.tolist() + [[0.0] * K] * right,
    }


def distillkit(row):
    """Prediction rows without the last; exact values as differences, ids packed with the high bit first."""
    ids, values = top(full_log_probs(row["input_ids"])[:-1])
    steps = np.diff(values, axis=1, prepend=0).astype("<f4")
    steps[:, 0] = values[:, 0]
    bits = "".join
    packed = [
        [int(bits(format(i, "06b") for i in one).ljust(32, "0")[b : b + 8], 2) for b in range(0, 32, 8)] for one in ids
    ]
    return {
        "input_ids": row["input_ids"],
        "compressed_logprobs": steps.view(np.uint8).reshape(len(steps), -1).tolist(),
        "bytepacked_indices": packed,
    }


CONFIG = {"d": VOCAB, "k": K, "exact_k": K, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": True}
MAKE = {"axolotl": axolotl, "verl": verl, "distillkit": distillkit}


def write(folder, name, raw, jsonl=False):
    folder.mkdir()
    if jsonl:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in raw))
    else:
        pq.write_table(pa.Table.from_pylist(raw), folder / "rows.parquet")
    if name == "distillkit":
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def read(name, folder, cache, **changes):
    import_rows(
        name, folder, cache, model_id="teacher", tokenizer_fingerprint="tok", chat_template_fingerprint="chat",
        vocab_size=VOCAB, **{"log_probs_dtype": "float32", **changes},
    )  # fmt: skip
    return ReferenceCache.open(cache)


def checksums(rows):
    return [row_checksum(row["input_ids"], supervised_mask(row["labels"])) for row in rows]


@pytest.mark.parametrize("name", ["axolotl", "verl", "distillkit"])
def test_imported_rows_say_what_the_model_says(tmp_path, name):
    rows = spoken_rows(12, masked=name != "distillkit")
    cache = read(
        name, write(tmp_path / "theirs", name, [MAKE[name](row) for row in rows], jsonl=name == "verl"), tmp_path / "c"
    )
    renormalized = name == "axolotl"
    assert cache.manifest.tail_policy == ("renormalize" if renormalized else "bucket")
    assert cache.manifest.columns == ("topk_ids", "topk_log_probs", *(() if renormalized else ("tail_log_mass",)))
    for row, index in zip(rows, cache.locate(checksums(rows)), strict=True):
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        said = full_log_probs(row["input_ids"])[[t - 1 for t in places]]
        ids, values = top(said)
        found = cache.row(index)
        np.testing.assert_array_equal(found["topk_ids"], ids)
        mass = np.exp(values).sum(-1, keepdims=True)
        np.testing.assert_allclose(found["topk_log_probs"], values - np.log(mass) * renormalized, atol=1e-5)
        if not renormalized:
            np.testing.assert_allclose(np.exp(found["tail_log_mass"]), 1 - mass[:, 0], atol=1e-5)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_wrong_shift_is_refused_and_may_be_stated(tmp_path, wrong):
    rows = spoken_rows(20)
    folder = write(tmp_path / "theirs", "axolotl", [axolotl(row, wrong) for row in rows])
    with pytest.raises(DataError, match=rf"not aligned as axolotl aligns them .*--shift {-wrong}"):
        read("axolotl", folder, tmp_path / "c")
    cache = read("axolotl", folder, tmp_path / "c", shift=-wrong)
    ids, _ = top(full_log_probs(rows[0]["input_ids"]))
    places = [t for t in range(1, len(rows[0]["labels"]) - max(0, wrong)) if rows[0]["labels"][t] != -100]
    np.testing.assert_array_equal(cache.row(0)["topk_ids"], ids[[t - 1 for t in places]])


def test_masked_slots_mean_nothing(tmp_path):
    """Each third slot is masked and holds a token of probability one."""
    rows = spoken_rows(12)
    raw = [axolotl(row) for row in rows]
    for row in raw:
        for values, mask in zip(row["target_logprobs"], row["target_mask"], strict=True):
            values[2], mask[2] = 0.0, 0
    cache = read("axolotl", write(tmp_path / "theirs", "axolotl", raw), tmp_path / "c")
    assert cache.manifest.tail_policy == "bucket"
    for row, index in zip(rows, cache.locate(checksums(rows)), strict=True):
        places = [t for t in range(1, len(row["labels"])) if row["labels"][t] != -100]
        ids, values = top(full_log_probs(row["input_ids"])[[t - 1 for t in places]])
        p = np.exp(values - np.log(np.exp(values).sum(-1, keepdims=True)))
        found = cache.row(index)
        np.testing.assert_array_equal(found["topk_ids"], np.c_[np.delete(ids, 2, 1), np.full(len(ids), -1)])
        np.testing.assert_allclose(np.exp(found["topk_log_probs"]), np.c_[np.delete(p, 2, 1), 0 * p[:, :1]], atol=1e-6)
        np.testing.assert_allclose(np.exp(found["tail_log_mass"]), p[:, 2], atol=1e-5)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("target_logprobs", -0.1, r"row 2: listed probabilities sum to 4\.524; expected log-probs at temperature 1"),
        ("target_logprobs", float("nan"), "row 2: listed probabilities sum to nan"),
        ("target_token_ids", VOCAB, rf"row 2 lists id {VOCAB}, expected 0 to {VOCAB - 1}; .*--vocab-size"),
        ("target_token_ids", -1, "row 2 lists id -1"),
    ],
)
def test_every_row_is_judged_not_the_probed_ones_alone(tmp_path, monkeypatch, column, value, words):
    monkeypatch.setattr(foreign, "PROBED", 2)  # the first and the last
    raw = [axolotl(row) for row in spoken_rows(12)]
    raw[1][column] = np.full_like(raw[1][column], value).tolist()
    with pytest.raises(DataError, match=words):
        read("axolotl", write(tmp_path / "theirs", "axolotl", raw), tmp_path / "c", shift=0)


def test_one_row_that_is_not_scaled_up_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "PROBED", 2)
    raw = [axolotl(row) for row in spoken_rows(12)]
    raw[1]["target_logprobs"] = (np.array(raw[1]["target_logprobs"]) - np.log(2)).tolist()
    cache = read("axolotl", write(tmp_path / "theirs", "axolotl", raw), tmp_path / "c", shift=0)
    assert cache.manifest.tail_policy == "bucket"
    np.testing.assert_allclose(np.exp(cache.row(1)["tail_log_mass"]), 0.5, atol=1e-5)


def test_rows_of_noise_are_refused(tmp_path):
    rows, rng = spoken_rows(20), np.random.default_rng(0)
    raw = [axolotl(row) for row in rows]
    for row in raw:
        row["target_token_ids"] = rng.integers(0, VOCAB, (len(row["input_ids"]), K)).tolist()
    with pytest.raises(DataError, match=r"cannot be told|not aligned"):
        read("axolotl", write(tmp_path / "theirs", "axolotl", raw), tmp_path / "c")


@pytest.mark.parametrize("name", ["axolotl", "verl", "distillkit"])
def test_export_and_import_give_the_numbers_back(tmp_path, name):
    rows = spoken_rows(9, masked=name != "distillkit")
    write_cache(tmp_path / "ours", rows, LocalSource(tiny_model()), provenance(K), shard_rows=4)
    ours = ReferenceCache.open(tmp_path / "ours")
    assert export_rows(ours, rows, name, tmp_path / "theirs") == 9
    back = read(name, tmp_path / "theirs", tmp_path / "back")
    for row, index in zip(rows, back.locate(checksums(rows)), strict=True):
        before, after = ours.row(ours.locate(checksums([row]))[0]), back.row(index)
        np.testing.assert_array_equal(after["topk_ids"], before["topk_ids"])
        expected = before["topk_log_probs"]
        if name == "axolotl":
            expected = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
        np.testing.assert_allclose(after["topk_log_probs"], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["axolotl", "verl", "distillkit"])
def test_unused_slots_are_real_ids_without_mass_elsewhere(tmp_path, name):
    """An imported cache has fewer ids at some tokens; what it exports lists real ids, each once, and comes back as it was."""
    rows = spoken_rows(9, masked=name != "distillkit")
    raw = [axolotl(row) for row in rows]
    for row in raw:
        for values, mask in zip(row["target_logprobs"][::2], row["target_mask"][::2], strict=True):
            values[1], mask[1], mask[3] = 0.0, 0, 0
    ours = read("axolotl", write(tmp_path / "theirs", "axolotl", raw), tmp_path / "ours")
    assert any((ours.row(i)["topk_ids"] < 0).any() for i in range(len(ours)))
    export_rows(ours, rows, name, tmp_path / "out")
    exported = pq.read_table(tmp_path / "out" / "data_0.parquet").to_pylist()
    for row in exported:
        if name == "distillkit":
            ids = unpack_bits(np.array(row["bytepacked_indices"], np.uint8), 6, K)
        else:
            shift = int(name == "verl")
            at = [t - shift for t in range(1, len(row["input_ids"])) if row[MASKS[name]][t] not in (0, -100)]
            ids = np.array(row[IDS[name]])[at]
        assert ids.min() >= 0 and ids.max() < VOCAB
        assert all(len(set(one)) == K for one in ids.tolist())
    back = read(name, tmp_path / "out", tmp_path / "back")
    for index in range(len(ours)):
        before, after = ours.row(index), back.row(index)
        np.testing.assert_array_equal(after["topk_ids"], before["topk_ids"])
        expected = before["topk_log_probs"]
        if name == "axolotl":
            expected = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
        used = before["topk_ids"] >= 0
        np.testing.assert_allclose(after["topk_log_probs"][used], expected[used], atol=1e-6)
        assert (np.exp(after["topk_log_probs"][~used]) == 0).all()


MASKS = {"axolotl": "labels", "verl": "response_mask"}
IDS = {"axolotl": "target_token_ids", "verl": "teacher_ids"}


def test_what_cannot_be_exported_or_read_says_so(tmp_path):
    rows = spoken_rows(3)
    write_cache(tmp_path / "labels", rows, HashSource(), provenance())
    with pytest.raises(IncompatibleError, match="holds no top-k"):
        export_rows(ReferenceCache.open(tmp_path / "labels"), rows, "verl", tmp_path / "out")
    write_cache(tmp_path / "top", rows, HashSource(2), provenance(2))
    cache = ReferenceCache.open(tmp_path / "top")
    with pytest.raises(DataError, match="DistillKit trains on every token"):
        export_rows(cache, rows, "distillkit", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"expected a \.parquet"):
        read("verl", tmp_path / "nowhere", tmp_path / "c")
    folder = write(tmp_path / "odd", "verl", ragged_rows(3))
    with pytest.raises(DataError, match="no teacher_ids; expected a verl row"):
        read("verl", folder, tmp_path / "c")
    folder = write(tmp_path / "fitted", "distillkit", [distillkit(row) for row in spoken_rows(3, masked=False)])
    (folder / "compression_config.yaml").write_text(yaml.safe_dump({**CONFIG, "exact_k": 2}))
    with pytest.raises(ConfigError, match="exact_k equal to k"):
        read("distillkit", folder, tmp_path / "c")


@pytest.mark.parametrize("width", [1, 6, 18, 31])
def test_bits_come_back(width):
    values = np.random.default_rng(0).integers(0, 2**width, (7, 5))
    packed = pack_bits(values, width)
    assert packed.shape == (7, -(-5 * width // 8))
    text = "".join(format(v, f"0{width}b") for v in values[0])
    assert format(int.from_bytes(packed[0].tobytes(), "big"), f"0{8 * packed.shape[1]}b").startswith(text)
    np.testing.assert_array_equal(unpack_bits(packed, width, 5), values)
