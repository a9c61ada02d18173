from __future__ import annotations

import copy
import hashlib
import json
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtarget.core.errors import CacheMismatchError, DataError, QTargetError, UnsupportedModelError
from qtarget.scoring.cache.schema import (
    SAMPLED_ABOVE,
    Manifest,
    _sample,
    fingerprint_chat_template,
    fingerprint_model,
    fingerprint_tokenizer,
    row_checksum,
    supervised_mask,
)
from qtarget.scoring.cache.writer import write_cache
from tests.scoring.helpers import HashSource, provenance, ragged_rows, tiny_model


def test_mask_excludes_masked_labels_and_the_first_position():
    assert supervised_mask([3, 4, -100, 0]) == [False, True, False, True]
    assert supervised_mask([-100]) == [False]
    assert supervised_mask([]) == []


def test_checksum_is_blake2b_of_packed_ids_and_mask():
    ids, mask = [7, 0, 2**31 - 1], [False, True, False]
    packed = struct.pack("<3i", *ids) + bytes([0, 1, 0])
    assert row_checksum(ids, mask) == hashlib.blake2b(packed, digest_size=16).hexdigest()
    assert row_checksum(torch.tensor(ids), torch.tensor(mask)) == row_checksum(ids, mask)


def test_checksum_tells_ids_mask_and_length_apart():
    rows = [([1, 2], [0, 1]), ([1, 2], [0, 0]), ([1, 3], [0, 1]), ([1, 2, 0], [0, 1, 0]), ([1], [0]), ([], [])]
    assert len({row_checksum(ids, [bool(m) for m in mask]) for ids, mask in rows}) == len(rows)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2], [False], "equal lengths"),
        ([1, 2], [True, True], "position 0"),
        ([1, -1], [False, True], "-1 to 1"),
        ([1, 2**31], [False, True], "2147483648"),
    ],
)
def test_checksum_refuses(ids, mask, message):
    with pytest.raises(DataError, match=message):
        row_checksum(ids, mask)


# -- model -------------------------------------------------------------------------------------------------------


def test_model_fingerprint_follows_values_not_identity_or_dtype():
    model = tiny_model()
    expected = fingerprint_model(model)
    assert fingerprint_model(tiny_model()) == expected
    assert fingerprint_model(tiny_model(seed=1)) != expected
    halves = tiny_model().to(torch.bfloat16)
    assert fingerprint_model(halves) == fingerprint_model(copy.deepcopy(halves).float())
    assert fingerprint_model(halves) != expected
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint_model(model) != expected


def test_model_fingerprint_is_blake2b_over_sorted_names_shapes_and_values():
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tiny_model().state_dict().items()):
        state.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert fingerprint_model(tiny_model()) == state.hexdigest()


def test_tied_weights_count_once_and_by_the_name_of_the_embedding():
    tied = tiny_model(tie_word_embeddings=True)
    assert fingerprint_model(tied) == fingerprint_model(tiny_model(tie_word_embeddings=True))
    names = [name for name in tied.state_dict() if name != "lm_head.weight"]
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(names):
        value = tied.state_dict()[name]
        state.update(f"{name}{tuple(value.shape)}".encode() + value.numpy().tobytes())
    assert fingerprint_model(tied) == state.hexdigest()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}},
    ],
)
def test_an_adapter_does_not_change_the_fingerprint(lora, tied):
    expected = fingerprint_model(tiny_model(tie_word_embeddings=tied))
    adapted = get_peft_model(tiny_model(tie_word_embeddings=tied), LoraConfig(r=2, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 1
    assert fingerprint_model(adapted) == expected
    assert fingerprint_model(adapted.get_base_model()) == expected


def test_merging_an_adapter_changes_the_fingerprint():
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert fingerprint_model(adapted.merge_and_unload()) != fingerprint_model(tiny_model())


def test_wrapping_by_compile_does_not_change_the_fingerprint():
    compiled = torch.nn.Module()
    compiled.add_module("_orig_mod", tiny_model())  # what torch.compile returns, without its five seconds of import
    assert fingerprint_model(compiled) == fingerprint_model(tiny_model())


def test_large_tensors_are_sampled_over_all_columns():
    width = 1024
    large = torch.arange(8 * SAMPLED_ABOVE, dtype=torch.float64).reshape(-1, width)
    sample = _sample(large)
    assert len(sample) <= SAMPLED_ABOVE
    assert len((sample.long() % width).unique()) == width
    assert torch.equal(_sample(torch.arange(SAMPLED_ABOVE)), torch.arange(SAMPLED_ABOVE))


def test_a_model_without_values_is_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        fingerprint_model(tiny_model().to("meta"))


# -- tokenizer and template --------------------------------------------------------------------------------------


def word_tokenizer(words: str = "a b c d", **special: str) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", *words.split()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", **special)


def test_tokenizer_fingerprint_ignores_padding_and_truncation():
    tokenizer = word_tokenizer()
    expected = fingerprint_tokenizer(tokenizer)
    assert fingerprint_tokenizer(word_tokenizer()) == expected
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer(["a b c", "a"], padding=True, truncation=True, max_length=2)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["truncation"] is not None
    assert fingerprint_tokenizer(tokenizer) == expected


def test_tokenizer_fingerprint_follows_all_that_changes_ids(tmp_path):
    base = word_tokenizer()
    grown, stripped = word_tokenizer(), word_tokenizer()
    grown.add_tokens(["new"])
    stripped.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    others = [word_tokenizer("b a c d"), word_tokenizer(bos_token="<eos>"), grown, stripped]
    assert len({fingerprint_tokenizer(t) for t in [base, *others]}) == 5
    base.save_pretrained(tmp_path)
    assert fingerprint_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == fingerprint_tokenizer(base)


def test_chat_template_fingerprint_takes_text_or_tokenizer():
    tokenizer = word_tokenizer()
    assert fingerprint_chat_template(tokenizer) == fingerprint_chat_template(None)
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint_chat_template(tokenizer) == fingerprint_chat_template("{{ messages }}")
    assert fingerprint_chat_template("{{ messages }} ") != fingerprint_chat_template("{{ messages }}")


# -- manifest ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path):
    write_cache(tmp_path, ragged_rows(5), HashSource(), provenance(), shard_rows=2)
    return tmp_path


def test_manifest_survives_writing_and_reading(cache):
    manifest = Manifest.read(cache)
    before = (cache / "manifest.json").read_bytes()
    manifest.write(cache)
    assert (cache / "manifest.json").read_bytes() == before
    keys = list(json.loads(before))
    assert keys == sorted(keys)
    assert (manifest.temperature, manifest.alignment, manifest.schema_version) == (1.0, "causal", 2)
    assert [shard.name for shard in manifest.shards] == [f"shard-0000{i}.parquet" for i in range(3)]


def change(**changes):
    def edit(text):
        value = {**json.loads(text), **changes}
        return json.dumps({k: v for k, v in value.items() if v is not None})

    return edit


def shard(number=1, **changes):
    """Changes one shard's record; the manifest's own counts still hold."""

    def edit(text):
        value = json.loads(text)
        value["shards"][number] |= changes
        return json.dumps(value)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(schema_version=3), "schema_version 3, this qtarget reads 1 to 2; .* into another folder"),
        (change(schema_version=None), "schema_version None"),
        (lambda text: text[:40], "broken JSON.*finished shards are kept"),
        (lambda text: "[]", "unusable"),
        (change(top_k=None), "missing or unknown fields: top_k"),
        (change(colour="red"), "missing or unknown fields: colour"),
        (change(tail_policy="drop"), "tail_policy 'drop'"),
        (change(rows=6), "rows and tokens"),
        (change(shards=[{"name": "x"}]), "unusable"),
        (
            shard(name="../shard-00001.parquet"),
            r"named '../shard-00001.parquet', expected a name like shard-00000.parquet",
        ),
        (shard(name="/shard-00001.parquet"), "a shard is named"),
        (shard(name="shard-00001.parquet\n"), "a shard is named"),
        (shard(name=7), "unusable"),
        (shard(name="shard-00000.parquet"), "two shards have one name"),
        (shard(blake2b="../" * 8 + "elsewhe"), "shard-00001.parquet has the hash .*32 hexadecimal digits"),
        (shard(blake2b="AB" * 16), "32 hexadecimal digits"),
        (shard(bytes=-1), "none negative"),
        (shard(bytes=1.0), "whole numbers"),
        (shard(bytes=True), "whole numbers"),
    ],
)
def test_manifest_refuses(cache, edit, message):
    path = cache / "manifest.json"
    path.write_text(edit(path.read_text()))
    with pytest.raises(CacheMismatchError, match=message) as caught:
        Manifest.read(cache)
    assert isinstance(caught.value, QTargetError)
    assert "qtarget score CONFIG.yaml" in str(caught.value)


def test_a_missing_folder_and_a_missing_manifest_differ(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheMismatchError, match=r"no manifest.json, so scoring is unfinished.*qtarget score"):
        Manifest.read(cache)
    with pytest.raises(CacheMismatchError, match=r"no cache folder .*elsewhere; run `qtarget score"):
        Manifest.read(cache / "elsewhere")
