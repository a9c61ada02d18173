"""Rows that other projects scored, read into a cache: DistillKit, axolotl, verl.

What differs between them is where a position's numbers lie. Two conventions exist:

- *label rows* (axolotl): numbers at ``t`` are about token ``t``; its trainer shifts labels and numbers together;
- *prediction rows* (DistillKit, verl): numbers at ``t`` are what the model says after token ``t``, about token ``t + 1``.

A wrong shift trains without an error, on nonsense. So it is measured: under the right shift the observed token is far
likelier than under any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qtarget.core.errors import ConfigError, DataError, QTargetError
from qtarget.scoring.cache.columns import LOWEST
from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.rows import IntArray, ScoredRow, check_request
from qtarget.scoring.cache.schema import IGNORE_INDEX, Manifest, Provenance
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.exchange.bits import unpack_bits
from qtarget.storage.files import digest, digest_file
from qtarget.storage.folders import CACHE, check_folder

SHIFT = {"distillkit": 1, "axolotl": 0, "verl": 1}
"""Numbers about token ``t`` lie at ``t - shift``."""

MASS_SLACK = 1e-3
"""How far listed probabilities may be from one and still count as scaled up to one; half-precision log-probs allow it."""

MARGIN = 2.0
"""The right shift must make the observed token this much likelier than the next best, or it cannot be told."""

PROBED = 200
"""Rows whose shift is measured."""


@dataclass(frozen=True)
class Listed:
    """A foreign row: ``input_ids [time]``, which tokens are trained, and what lies at each index.

    Attributes:
        ids, log_probs: ``[indices, k]``; an unused slot has minus infinity, or anything down to ``LOWEST``.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray


def open_rows(path: str | Path) -> Any:
    """A data set over a ``.parquet`` or ``.jsonl`` file, or a folder of them; read from disk row by row.

    Raises:
        ConfigError: no such files.
    """
    from datasets import load_dataset

    path = Path(path)
    files = sorted(path.glob("*.parquet")) + sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(f"{path}: expected a .parquet or .jsonl file, or a folder that holds some")
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=[str(file) for file in files], split="train")


def reader_of(name: str, path: str | Path) -> Callable[[Mapping[str, Any]], Listed]:
    """What turns a raw row of this format into a ``Listed``.

    Raises:
        ConfigError: no such format, or DistillKit rows whose compression cannot be undone exactly.
    """
    if name == "axolotl":
        return read_axolotl
    if name == "verl":
        return read_verl
    if name == "distillkit":
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        settings = folder / "compression_config.yaml"
        return DistillKit(yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else None)
    raise ConfigError(f"format {name!r} is unknown; expected one of {', '.join(SHIFT)}")


def named(read: Callable[[Mapping[str, Any]], Listed], project: str) -> Callable[[Mapping[str, Any]], Listed]:
    """The same reader, whose rows of other types or shapes are a named error."""

    def checked(raw: Mapping[str, Any]) -> Listed:
        try:
            return read(raw)
        except (TypeError, ValueError, IndexError) as error:
            if isinstance(error, QTargetError):
                raise
            raise DataError(f"a row is none of {project}: {error}; expected its numbers, [time, k] each") from error

    return checked


def column(raw: Mapping[str, Any], name: str, project: str) -> Any:
    """A column of a foreign row.

    Raises:
        DataError: it is missing.
    """
    if raw.get(name) is None:
        raise DataError(
            f"a row has no {name}; expected a {project} row with it, found columns {', '.join(sorted(raw))}"
        )
    return raw[name]


def trained(raw: Mapping[str, Any], length: int) -> np.ndarray:
    """Which tokens are trained: by ``labels``, by a mask of the whole row or of its last tokens, or all."""
    if raw.get("labels") is not None:
        return np.asarray(np.asarray(raw["labels"]) != IGNORE_INDEX)
    for name in ("loss_mask", "response_mask"):
        if raw.get(name) is not None:
            mask = np.asarray(raw[name], bool)
            # a mask that is shorter than the row is one of the response, which ends it
            return np.concatenate([np.zeros(length - len(mask), bool), mask])
    return np.ones(length, bool)


def read_axolotl(raw: Mapping[str, Any]) -> Listed:
    """``target_token_ids``, ``target_logprobs``, ``target_mask``, ``[time, k]`` each; masked slots mean nothing."""
    ids = np.asarray(column(raw, "target_token_ids", "axolotl"), np.int64)
    mask = np.asarray(column(raw, "target_mask", "axolotl"), bool)
    log_probs = np.asarray(column(raw, "target_logprobs", "axolotl"), np.float32)
    log_probs = np.where(mask, log_probs, -np.inf)
    input_ids = np.asarray(column(raw, "input_ids", "axolotl"), np.int64)
    known = {"labels": raw.get("labels")}
    supervised = trained(known, len(input_ids)) if known["labels"] is not None else np.asarray(mask.any(1))
    return Listed(input_ids, supervised, ids, log_probs)


def read_verl(raw: Mapping[str, Any]) -> Listed:
    """``teacher_ids``, ``teacher_logprobs`` ``[time, k]``, padded like ``input_ids``; padding goes by ``attention_mask``."""
    input_ids = np.asarray(column(raw, "input_ids", "verl"), np.int64)
    real = (
        np.asarray(raw["attention_mask"], bool)
        if raw.get("attention_mask") is not None
        else np.ones_like(input_ids, bool)
    )
    ids = np.asarray(column(raw, "teacher_ids", "verl"), np.int64)
    log_probs = np.asarray(column(raw, "teacher_logprobs", "verl"), np.float32)
    if len(ids) != len(input_ids):
        raise DataError(
            f"teacher_ids has {len(ids)} rows, input_ids {len(input_ids)} tokens; expected equal, padding included"
        )
    return Listed(input_ids[real], trained(raw, len(input_ids))[real], ids[real], log_probs[real])


@dataclass(frozen=True)
class DistillKit:
    """``compressed_logprobs`` and ``bytepacked_indices`` (or ``top_values`` and ``token_ids``), one row fewer than tokens.

    Attributes:
        config: its ``compression_config.yaml``.
    """

    config: Mapping[str, Any] | None

    def __call__(self, raw: Mapping[str, Any]) -> Listed:
        input_ids = np.asarray(column(raw, "input_ids", "DistillKit"), np.int64)
        supervised = trained(raw, len(input_ids))
        if raw.get("token_ids") is not None:
            values = np.asarray(column(raw, "top_values", "DistillKit"), np.float32)
            return Listed(input_ids, supervised, np.asarray(raw["token_ids"], np.int64), values)
        k, dtype, width = self._layout()
        packed = np.asarray(column(raw, "compressed_logprobs", "DistillKit"), np.uint8)
        values = packed.view(dtype).astype(np.float64)
        if self.config and self.config.get("delta_encoding", True):
            values = values.cumsum(-1)
        indices = np.asarray(column(raw, "bytepacked_indices", "DistillKit"), np.uint8)
        return Listed(input_ids, supervised, unpack_bits(indices, width, k), values.astype(np.float32))

    def _layout(self) -> tuple[int, np.dtype, int]:
        if self.config is None:
            raise ConfigError(
                "compressed DistillKit rows need the compression_config.yaml that was written beside them"
            )
        k, exact = int(self.config["k"]), int(self.config["exact_k"])
        dtype = self.config.get("exact_dtype", "float32")
        if exact != k or dtype not in ("float16", "float32", "float64"):
            raise ConfigError(
                f"compression_config.yaml says k {k}, exact_k {exact}, exact_dtype {dtype}; expected exact_k equal to k in "
                "float16, float32 or float64: a fitted polynomial is no teacher's number; capture with exact_k = k"
            )
        return k, np.dtype(dtype), int(np.ceil(np.log2(np.float32(self.config["d"]))))


def aligned(row: Listed, shift: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions whose numbers exist, and ids and log-probs ``[positions, k]`` there, descending.

    Returns nothing at position 0, and nothing where every slot is unused.
    """
    values = np.where(
        row.log_probs <= LOWEST, -np.inf, row.log_probs
    )  # padded slots carry minus infinity, -1e9 or ours
    at = np.flatnonzero(row.supervised)
    at = at[(at >= 1) & (at >= shift) & (at - shift < len(row.ids))]
    if len(at):
        found = values[at - shift]
        blank = (found == 0).all(1) & (found.shape[1] > 1)  # verl pads with zeros
        at = at[(found != -np.inf).any(1) & ~blank]  # NaN stays, to be refused
    ids, log_probs = row.ids[at - shift], values[at - shift]
    order = np.argsort(-log_probs, axis=1, kind="stable")
    return at, np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)


def label_probability(rows: Sequence[Listed], shift: int) -> float:
    """Mean probability of the observed token, 0 where it is not listed."""
    total, count = 0.0, 0
    for row in rows:
        at, ids, log_probs = aligned(row, shift)
        hit = (ids == row.input_ids[at][:, None]) & np.isfinite(log_probs)
        total += float(np.exp(log_probs, where=hit, out=np.zeros_like(log_probs)).sum())
        count += len(at)
    return total / max(1, count)


def check_shift(rows: Sequence[Listed], name: str, given: int | None) -> int:
    """The shift of a format, if the numbers bear it out, or the one given.

    Raises:
        DataError: another shift fits better, or none stands out.
    """
    if given is not None:
        return given
    shift = SHIFT[name]
    found = {s: label_probability(rows, s) for s in (-1, 0, 1, 2)}
    told = ", ".join(f"{p:.3g} at shift {s}" for s, p in found.items())
    best = max(found, key=lambda s: found[s])
    others = max(p for s, p in found.items() if s != best)
    if best != shift and found[best] > MARGIN * others:
        raise DataError(
            f"the rows are not aligned as {name} aligns them (shift {shift}): the observed token has a mean probability of "
            f"{told}; expected the highest at shift {shift}; check how they were made, or state it: --shift {best}"
        )
    if best != shift or found[best] <= MARGIN * others:
        raise DataError(
            f"the alignment of the rows cannot be told: the observed token has a mean probability of {told}; expected one to "
            f"stand out; check how they were made, and state it: --shift {shift} is what {name} uses"
        )
    return shift


class ForeignSource:
    """Answers ``score`` from foreign rows instead of a model.

    Args:
        rows: a sequence of raw rows.
        read: see ``reader_of``.
        shift: numbers about token ``t`` lie at ``t - shift``.
        vocab_size: of the teacher's head.

    Attributes:
        top_k: most slots that a token of any row has.
        renormalized: listed probabilities sum to one in every row, so no tail mass is known.

    Raises:
        DataError: no row has numbers, or a row's are no log-probs over this vocabulary.
    """

    def __init__(self, rows: Any, read: Callable[[Mapping[str, Any]], Listed], shift: int, vocab_size: int) -> None:
        self._rows, self._read, self._shift = rows, read, shift
        self.vocab_size = vocab_size
        self._where: dict[str, int] = {}
        self.top_k, tokens, furthest = 0, 0, 0.0
        for index in range(len(rows)):
            row = read(rows[index])
            at, ids, log_probs = aligned(row, shift)
            mass = self._mass(index, ids, log_probs)
            self._where[self._key(row.input_ids, at)] = index
            self.top_k, tokens = max(self.top_k, ids.shape[1]), tokens + len(at)
            furthest = max(furthest, float(np.abs(mass - 1).max(initial=0.0)))
        if not tokens:
            raise DataError("no trained token of any row has numbers; expected some; check labels and masks")
        self.renormalized = furthest < MASS_SLACK

    def _mass(self, index: int, ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Listed probability at each position of a row, ``[positions]`` float64.

        Raises:
            DataError: it exceeds one, or an id is outside the vocabulary.
        """
        used = ids[log_probs != -np.inf]
        if len(wrong := used[(used < 0) | (used >= self.vocab_size)]):
            raise DataError(
                f"row {index + 1} lists id {wrong[0]}, expected 0 to {self.vocab_size - 1}; state the rows of the teacher's head: "
                "--vocab-size"
            )
        mass = np.exp(log_probs.astype(np.float64)).sum(1)
        if len(wrong := mass[~(mass <= 1 + 10 * MASS_SLACK)]):
            raise DataError(
                f"row {index + 1}: listed probabilities sum to {wrong[0]:.4g}; expected log-probs at "
                "temperature 1, at most 1 in all"
            )
        return mass

    def _tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        row = self._read(self._rows[index])
        return row.input_ids, aligned(row, self._shift)[0]

    @staticmethod
    def _key(ids: np.ndarray, at: np.ndarray) -> str:
        return digest(ids.astype("<i8").tobytes() + b"|" + at.astype("<i8").tobytes())

    def training_row(self, index: int) -> dict[str, np.ndarray]:
        """``input_ids`` and ``labels`` of a row, labels only where numbers exist."""
        ids, at = self._tokens(index)
        labels = np.full_like(ids, IGNORE_INDEX)
        labels[at] = ids[at]
        return {"input_ids": ids, "labels": labels}

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``; of the label's log-prob and the entropy nothing is known."""
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, self.vocab_size)
        return [self._numbers(self._where[self._key(ids, at)]) for ids, at in zip(rows, places, strict=True)]

    def _numbers(self, index: int) -> ScoredRow:
        _, ids, log_probs = aligned(self._read(self._rows[index]), self._shift)
        ids = np.where(np.isfinite(log_probs), ids, -1).astype(np.int32)
        tail = None
        if not self.renormalized:
            rest = 1 - np.exp(log_probs.astype(np.float64)).sum(1)
            # rounding may leave less than nothing
            tail = np.log(rest.clip(min=np.finfo(np.float32).tiny)).astype(np.float32)
        listed, found = self._padded(ids, -1), self._padded(log_probs.clip(min=LOWEST), LOWEST)
        return ScoredRow(None, None, listed, found, tail)  # pyright: ignore[reportArgumentType]

    def _padded(self, values: np.ndarray, fill: float) -> np.ndarray:
        return np.pad(values, ((0, 0), (0, self.top_k - values.shape[1])), constant_values=fill)


class ForeignRows(Sequence[Mapping[str, Any]]):
    """The rows of a ``ForeignSource`` as ``write_cache`` takes them, read one at a time."""

    def __init__(self, source: ForeignSource, count: int) -> None:
        self._source, self._count = source, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self._source.training_row(index)


def probe(rows: Any, read: Callable[[Mapping[str, Any]], Listed]) -> list[Listed]:
    """Some rows, spread over all."""
    return [read(rows[int(i)]) for i in np.linspace(0, len(rows) - 1, min(len(rows), PROBED)).astype(int)]


def import_rows(
    name: str,
    path: str | Path,
    directory: str | Path,
    *,
    model_id: str,
    tokenizer_fingerprint: str,
    chat_template_fingerprint: str,
    vocab_size: int,
    shift: int | None = None,
    log_probs_dtype: str = "float16",
) -> Manifest:
    """Write a cache of rows that another project scored.

    Args:
        name: ``distillkit``, ``axolotl`` or ``verl``.
        path: its file or folder.
        model_id: the teacher's name, for people.
        vocab_size: rows of the teacher's head.
        shift: how the rows are aligned, when it is not as in the project named.

    Raises:
        DataError: rows that are not of this format, or aligned otherwise.
        ConfigError: no such file or format, or a folder that is somebody else's.
    """
    check_folder(directory, CACHE, inputs=[path])
    rows, read = open_rows(path), named(reader_of(name, path), name)
    source = ForeignSource(rows, read, check_shift(probe(rows, read), name, shift), vocab_size)
    files = sorted(Path(path).glob("*")) if Path(path).is_dir() else [Path(path)]
    provenance = Provenance(
        model_id=model_id,
        # no weights are at hand: the files stand for them
        model_fingerprint="imported-" + digest("".join(digest_file(f) for f in files if f.is_file()).encode()),
        tokenizer_fingerprint=tokenizer_fingerprint,
        chat_template_fingerprint=chat_template_fingerprint,
        vocab_size=vocab_size,
        dtype="unknown",
        top_k=source.top_k,
        tail_policy="renormalize" if source.renormalized else "bucket",
        log_probs_dtype=log_probs_dtype,
        versions=tool_versions(),
        engine=f"imported from {name}",
    )
    manifest = write_cache(directory, ForeignRows(source, len(rows)), source, provenance)
    ReferenceCache.open(directory)
    return manifest
