"""What a reference cache promises: the convention of its rows, the fingerprints of what made it, its manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from qtarget.core.errors import CacheMismatchError, DataError, UnsupportedModelError
from qtarget.core.types import TailPolicy
from qtarget.loss.zero3 import gathered
from qtarget.scoring.cache.crossfit import check_crossfit
from qtarget.storage.files import digest, write_json

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 stored numbers without steps and said less about its columns; it is still read."""
MANIFEST = "manifest.json"
DECODED = ".decoded"
"""Folder of side files inside a cache: no part of it, made again when needed."""
IGNORE_INDEX = -100
MOST_DRAWS = 255
"""Counts are stored in a byte."""
SAMPLED_ABOVE = 2**20
"""Tensors of more elements than this are fingerprinted by a sample of at most this many."""

# -- rows --------------------------------------------------------------------------------------------------------


def supervised_mask(labels: Sequence[int]) -> list[bool]:
    """Which positions of one row have a log-prob in the cache: the one place for that convention.

    Position ``t`` is supervised when ``labels[t] != -100`` and ``t >= 1``: a causal model predicts the token at ``t``
    from those before it (the shift), so nothing predicts position 0. ``labels`` are as long as ``input_ids``.

    Example:
        >>> supervised_mask([5, -100, 7])
        [False, False, True]
    """
    mask = (np.asarray(labels) != IGNORE_INDEX).tolist()
    return [False, *mask[1:]] if mask else []


def row_checksum(input_ids: Sequence[int], supervised: Sequence[bool]) -> str:
    """The name of a row: BLAKE2b (16 bytes, hexadecimal) over its little-endian int32 ids, then its mask, a byte each.

    Args:
        input_ids: token ids of one row, unpadded.
        supervised: ``supervised_mask(labels)`` of the same row.

    Raises:
        DataError: lengths differ, an id is no int32, or position 0 is marked.

    Example:
        >>> row_checksum([1, 2], [False, True])
        '853a09f25106683678f67e7e94785e9c'
    """
    ids, mask = np.asarray(input_ids, dtype=np.int64), np.asarray(supervised, dtype=bool)
    if ids.ndim != 1 or ids.shape != mask.shape:
        raise DataError(
            f"a row has input_ids of shape {ids.shape} and a mask of shape {mask.shape}; expected equal lengths"
        )
    if len(mask) and mask[0]:
        raise DataError(
            "position 0 of a row is marked supervised, but nothing predicts it; use supervised_mask(labels)"
        )
    if len(ids) and (ids.min() < 0 or ids.max() >= 2**31):
        raise DataError(f"token ids span {ids.min()} to {ids.max()}; expected 0 to {2**31 - 1}")
    return digest(ids.astype("<i4").tobytes() + mask.tobytes())


# -- fingerprints ------------------------------------------------------------------------------------------------

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Module names that ``torch.compile`` and others insert; they are left out of canonical names."""


def fingerprint_model(model: nn.Module) -> str:
    """BLAKE2b over the canonical names, shapes and float32 values of a model's parameters and persistent buffers.

    The same weights give the same fingerprint whether plain, inside PEFT (adapters are skipped, wrapped layers keep
    their own names), compiled, or in another dtype that holds the same values. Tied weights count once. Buffers that
    are not saved (rotary frequencies) are left out: they follow from the config and change with the dtype.

    Of a tensor of more than 2**20 elements only a fixed strided sample (at most 2**20 elements, odd stride) is read: it
    tells models, checkpoints and trained weights apart, and would miss an edit confined to a few single elements. Two
    models that differ in their config alone (rope theta) have the same fingerprint.

    Raises:
        UnsupportedModelError: a tensor has no values (meta device).
    """
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_canonical_tensors(_unwrapped(model)).items()):
        if tensor.is_meta:
            raise UnsupportedModelError(f"{name} is on the meta device and has no values; load the weights first")
        with gathered([tensor]):
            state.update(f"{name}{tuple(tensor.shape)}".encode())
            # float32, little-endian: one fingerprint for every dtype and machine that holds the same values
            state.update(_sample(tensor).to(torch.float32).cpu().numpy().astype("<f4").tobytes())
    return state.hexdigest()


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // SAMPLED_ABOVE)
    # an even stride divides the usual widths and would read the same few columns of every row
    return flat if stride <= 1 else flat[:: stride | 1]


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    base = getattr(model, "get_base_model", None)
    return base() if base is not None and hasattr(model, "peft_config") else model


def _canonical_tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _walk(model, ()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor
    return named


def _wrapped_by_peft(module: nn.Module) -> nn.Module | None:
    """The layer inside one of PEFT's; everything beside it belongs to the adapter."""
    inside = module._modules
    if "original_module" in inside:  # emptied when trainable tokens wrap the layer once more
        return inside["original_module"] or inside.get("token_adapter")
    return inside.get("base_layer")


def _walk(module: nn.Module, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    wrapped = _wrapped_by_peft(module)
    if wrapped is not None:
        yield from _walk(wrapped, path)
        return
    saved = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **saved}.items():
        if tensor is not None:
            yield ".".join((*path, name)), tensor
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, path if name in WRAPPERS else (*path, name))


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """BLAKE2b over all that decides which ids a text becomes: vocabulary, size, special tokens, a fast one's pipeline.

    Padding and truncation are left out, the padding token's name too: trainers set them, and rows are stored unpadded.
    A processor counts as its tokenizer.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    state: dict[str, Any] = {"vocab": tokenizer.get_vocab(), "size": len(tokenizer), "special": special}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        pipeline = json.loads(backend.to_str())
        state["pipeline"] = {k: v for k, v in pipeline.items() if k not in ("padding", "truncation")}
    return digest(json.dumps(state, sort_keys=True, default=str).encode())


def fingerprint_chat_template(tokenizer_or_template: Any) -> str:
    """BLAKE2b of a chat template: the text, a tokenizer's ``chat_template``, named templates, or none at all.

    Example:
        >>> fingerprint_chat_template(None) == fingerprint_chat_template("{{ messages }}")
        False
    """
    template = tokenizer_or_template
    if template is not None and not isinstance(template, str | dict | list):
        template = getattr(template, "chat_template", None)
    return digest(json.dumps(template, sort_keys=True).encode())


# -- manifest ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What made the numbers.

    Attributes:
        model_id: name or path of the frozen model, for people; the fingerprint decides.
        vocab_size: rows of the head, padding rows included (not the tokenizer's length).
        dtype: of the forward pass, ``float32``, ``bfloat16`` ...; log-softmax is float32 always.
        top_k: how many log-probs a token are kept; 0 for the label's alone.
        tail_policy: what stands for the unlisted tokens, see ``qtarget.Reference``.
        log_probs_dtype: of the stored log-probs: ``float16`` (top-k log-probs in half precision, off by at most 2**-11 of
            their value, label's and tail's by 2**-17: below the 8e-3 by which bfloat16 scoring moves them) or ``float32``
            (as scored, two to three times the size). Entropy is in half precision always.
        sampled: ids drawn a token, with replacement, instead of its top k; 0 for none.
        seed: of the draws, together with a row's checksum.
        versions: of qtarget, torch, transformers, pyarrow.
        temperature: of the stored log-probs; always 1.
        alignment: ``causal``: position t holds the log-prob of token t given those before it.
        engine: what ran the model: ``transformers`` (in this process, or in Ray's), ``vllm``, ``sglang``, ``qtarget`` (its
            own server, ``--engine mosec``), or ``imported from ...``.
        engine_version: of that engine, as it tells; empty if it does not.
        crossfit: of what copies of a model judged rows that they had not seen, and how these were trained (see
            ``qtarget.scoring.cache.crossfit``); absent where one model judged all rows.
    """

    model_id: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    chat_template_fingerprint: str
    vocab_size: int
    dtype: str
    top_k: int
    tail_policy: TailPolicy
    versions: dict[str, str]
    log_probs_dtype: str = "float16"
    sampled: int = 0
    seed: int = 0
    temperature: float = 1.0
    alignment: str = "causal"
    engine: str = "transformers"
    engine_version: str = ""
    crossfit: dict[str, Any] | None = None

    @property
    def base_fingerprint(self) -> str:
        """Of the model that is judged by: itself, or what the copies of a cross-fit began as."""
        return self.model_fingerprint if self.crossfit is None else self.crossfit["base_fingerprint"]


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: its file, what it holds, its size and BLAKE2b, and that of its decoded numbers.

    Attributes:
        decoded: ``decoded_digest`` of its side file; empty in caches of earlier releases.
    """

    name: str
    rows: int
    tokens: int
    bytes: int
    blake2b: str
    decoded: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest(Provenance):
    """``manifest.json``: written last, so a folder that has it is a finished cache.

    Attributes:
        rows, tokens: distinct rows, and supervised tokens in them.
        columns: what is known of each token: ``label_log_probs``, ``entropy`` ...; engines and importers may know less.
        shards: in row order.
    """

    rows: int
    tokens: int
    columns: tuple[str, ...]
    shards: tuple[ShardRecord, ...]
    schema_version: int = SCHEMA_VERSION

    def write(self, directory: str | Path) -> None:
        """Write ``manifest.json``, atomically."""
        # without a cross-fit the file is what releases before it wrote, and can read
        write_json(Path(directory) / MANIFEST, {k: v for k, v in asdict(self).items() if k != "crossfit" or v})

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read and check ``manifest.json`` of a cache folder.

        Raises:
            CacheMismatchError: no such folder, no manifest (an unfinished cache), broken JSON, another schema version,
                missing or unknown fields.
        """
        path = Path(directory) / MANIFEST
        if not path.parent.is_dir():
            raise CacheMismatchError(f"there is no cache folder {path.parent}; run `qtarget score CONFIG.yaml` once")
        if not path.exists():
            raise CacheMismatchError(
                f"{path.parent} has no {MANIFEST}, so scoring is unfinished or this is no cache; run "
                "`qtarget score CONFIG.yaml` again: it goes on where it stopped"
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value.get("schema_version")
            if version in READABLE_VERSIONS:
                return cls._parse(upgraded(value) if version == 1 else value)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            reason = f"broken JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise CacheMismatchError(
                f"{path} is unusable ({reason}); delete it and run `qtarget score CONFIG.yaml` again: "
                "finished shards are kept"
            ) from error
        raise CacheMismatchError(
            f"{path} has schema_version {version!r}, this qtarget reads {READABLE_VERSIONS[0]} to {SCHEMA_VERSION}; "
            "install the qtarget that wrote it, or run `qtarget score CONFIG.yaml` into another folder"
        )

    @classmethod
    def _parse(cls, value: dict[str, Any]) -> Manifest:
        value = {"crossfit": None, **value}
        known = {field.name for field in fields(cls)}
        if differing := sorted(known ^ set(value)):
            raise ValueError(f"missing or unknown fields: {', '.join(differing)}")
        if value["tail_policy"] not in get_args(TailPolicy):
            raise ValueError(f"tail_policy {value['tail_policy']!r}, expected one of {', '.join(get_args(TailPolicy))}")
        shards = tuple(ShardRecord(**shard) for shard in value["shards"])
        check_records(shards)
        check_meaning(value)
        counts = (sum(s.rows for s in shards), sum(s.tokens for s in shards))
        if counts != (value["rows"], value["tokens"]):
            raise ValueError(f"shards hold {counts} rows and tokens, expected {(value['rows'], value['tokens'])}")
        return cls(**{**value, "shards": shards, "columns": tuple(value["columns"])})


def check_meaning(value: dict[str, Any]) -> None:
    """Make sure that a manifest speaks of numbers that training can read, and does not contradict itself.

    Raises:
        ValueError: names the first field that does.
    """
    for name, lowest, highest in (
        ("vocab_size", 1, 2**31 - 1),
        ("top_k", 0, value["vocab_size"]),
        ("sampled", 0, MOST_DRAWS),
        ("seed", 0, 2**64),
    ):
        if type(value[name]) is not int or not lowest <= value[name] <= highest:
            raise ValueError(f"{name} is {value[name]!r}, expected a whole number from {lowest} to {highest}")
    for name, allowed in (
        ("temperature", (1.0,)),
        ("alignment", ("causal",)),
        ("log_probs_dtype", ("float16", "float32")),
    ):
        if value[name] not in allowed:
            raise ValueError(f"{name} is {value[name]!r}, expected {' or '.join(map(str, allowed))}")
    if value["top_k"] and value["sampled"]:
        raise ValueError(f"top_k is {value['top_k']} and sampled is {value['sampled']}, expected one of them to be 0")
    versions = value["versions"]
    if not (isinstance(versions, dict) and all(isinstance(v, str) for v in versions.values())):
        raise ValueError(f"versions are {versions!r}, expected names and versions")
    _check_columns(value["columns"], value["top_k"], value["sampled"])
    check_crossfit(value["crossfit"])


def _check_columns(columns: Any, top_k: int, sampled: int) -> None:
    wanted = {"topk_ids", "topk_log_probs"} if top_k else set()
    wanted |= {"sample_sizes", "sample_ids", "sample_counts"} if sampled else set()
    allowed = {"label_log_probs", "entropy", *wanted, *(["tail_log_mass"] if top_k else [])}
    named = list(columns) if isinstance(columns, list | tuple) else [columns]
    wrong = [name for name in named if name not in allowed] + sorted(wanted - set(named))
    if wrong or not named or len(set(named)) < len(named):
        raise ValueError(
            f"columns are {named}, expected each once: some of {sorted(allowed)}"
            f"{f', {sorted(wanted)} among them' if wanted else ''}, for top_k {top_k} and sampled {sampled}"
        )


def check_records(shards: Sequence[ShardRecord]) -> None:
    """Make sure that names are names of shards, so that no path leads out of the folder, and numbers are numbers.

    Raises:
        ValueError: names the first entry that is none.
    """
    for shard in shards:
        counts = (shard.rows, shard.tokens, shard.bytes)
        if not re.fullmatch(r"shard-[0-9]{5,}\.parquet", shard.name):
            raise ValueError(f"a shard is named {shard.name!r}, expected a name like shard-00000.parquet")
        if not re.fullmatch("([0-9a-f]{32})?", shard.decoded):
            raise ValueError(f"{shard.name} has the decoded hash {shard.decoded!r}, expected 32 hexadecimal digits")
        if not re.fullmatch("[0-9a-f]{32}", shard.blake2b):
            raise ValueError(f"{shard.name} has the hash {shard.blake2b!r}, expected 32 hexadecimal digits")
        # ``isinstance`` would take true for 1
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{shard.name} has rows, tokens and bytes {counts}, expected whole numbers, none negative")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("two shards have one name")


def upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 with the fields it had no need to say."""
    columns = ["label_log_probs", "entropy"]
    if value.get("top_k"):
        columns += ["topk_ids", "topk_log_probs", "tail_log_mass"]
    added = {"columns": columns, "sampled": 0, "seed": 0, "engine": "transformers", "engine_version": ""}
    return {**added, "log_probs_dtype": "float32", **value}


def size_on_disk(directory: Path) -> int:
    """Bytes of all files of a cache, but for its side files."""
    files = (path for path in directory.rglob("*") if path.is_file() and DECODED not in path.parts)
    return sum(path.stat().st_size for path in files)
