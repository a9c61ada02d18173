"""The binary wire: msgpack maps that hold flat little-endian buffers, so nothing is parsed number by number.

Request, ``POST /score``::

    version          int      1
    lengths          bin      uint32 [rows]        tokens of each row
    token_ids        bin      int32  [sum lengths] all rows, one after the other
    position_counts  bin      uint32 [rows]
    positions        bin      uint32 [tokens]      where numbers are wanted, ascending in each row, at least 1
    top_k            int      0 for none
    candidate_ids    bin      int32  [candidates]  or nil

Answer::

    version              int  1
    model                str  fingerprint of the weights that made it
    label_log_probs      bin  float32 [tokens]              in the order of the positions
    entropy              bin  float32 [tokens]
    topk_ids             bin  int32   [tokens, top_k]       or nil
    topk_log_probs       bin  float32 [tokens, top_k]       or nil
    tail_log_mass        bin  float32 [tokens]              or nil
    candidate_log_probs  bin  float32 [tokens, candidates]  or nil
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from qtarget.core.errors import DataError, HyperparameterError
from qtarget.scoring.cache.rows import ScoredRow, check_request
from qtarget.scoring.sources.identity import WIRE_VERSION, Limits

CONTENT_TYPE = "application/msgpack"

DTYPES = {
    "label_log_probs": np.dtype("<f4"),
    "entropy": np.dtype("<f4"),
    "topk_ids": np.dtype("<i4"),
    "topk_log_probs": np.dtype("<f4"),
    "tail_log_mass": np.dtype("<f4"),
    "candidate_log_probs": np.dtype("<f4"),
}
"""Of the buffers in an answer; the names are those of ``ScoredRow``."""


class MalformedError(DataError):
    """Bytes that are no message at all."""


class ScoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    """See the module."""

    lengths: bytes
    token_ids: bytes
    position_counts: bytes
    positions: bytes
    top_k: int
    candidate_ids: bytes | None = None
    version: int = WIRE_VERSION


class ScoreAnswer(msgspec.Struct, forbid_unknown_fields=True):
    """See the module."""

    model: str
    label_log_probs: bytes
    entropy: bytes
    topk_ids: bytes | None = None
    topk_log_probs: bytes | None = None
    tail_log_mass: bytes | None = None
    candidate_log_probs: bytes | None = None
    version: int = WIRE_VERSION


class Wanted(msgspec.Struct):
    """A checked request: ``Source.score``'s arguments."""

    rows: list[np.ndarray]
    positions: list[np.ndarray]
    top_k: int
    candidate_ids: list[int] | None


REQUEST = msgspec.msgpack.Decoder(ScoreRequest)
ANSWER = msgspec.msgpack.Decoder(ScoreAnswer)


def pack_request(
    rows: Sequence[np.ndarray], positions: Sequence[np.ndarray], top_k: int, candidate_ids: Sequence[int] | None
) -> bytes:
    """A request body from checked arguments."""
    request = ScoreRequest(
        lengths=_lengths(rows),
        token_ids=_flat(rows, "<i4"),
        position_counts=_lengths(positions),
        positions=_flat(positions, "<u4"),
        top_k=top_k,
        candidate_ids=None if candidate_ids is None else np.asarray(candidate_ids, dtype="<i4").tobytes(),
    )
    return msgspec.msgpack.encode(request)


def unpack_request(body: bytes | bytearray, limits: Limits, vocab_size: int) -> Wanted:
    """Everything about a request that can be wrong is found here.

    Raises:
        MalformedError: no msgpack map.
        DataError, HyperparameterError: wrong fields, types or sizes, beyond a limit, or refused by ``check_request``.
    """
    # the first byte of a map: msgspec would call a number or a list a map with wrong fields
    if not body or not (0x80 <= body[0] <= 0x8F or body[0] in (0xDE, 0xDF)):
        raise MalformedError("the request is no msgpack map")
    try:
        request = REQUEST.decode(body)
    except msgspec.ValidationError as error:
        raise DataError(f"the request has wrong fields: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"the request is no msgpack map: {error}") from error
    if request.version != WIRE_VERSION:
        raise DataError(f"version is {request.version}, this server speaks {WIRE_VERSION}; install its qtarget")
    lengths = _array("lengths", request.lengths, "<u4")
    counts = _array("position_counts", request.position_counts, "<u4")
    ids, positions = _array("token_ids", request.token_ids, "<i4"), _array("positions", request.positions, "<u4")
    candidates = None if request.candidate_ids is None else _array("candidate_ids", request.candidate_ids, "<i4")
    _check_sizes(lengths, counts, len(ids), len(positions))
    _check_limits(lengths, len(positions), request.top_k, candidates, limits)
    listed = None if candidates is None else candidates.tolist()
    rows, places = check_request(
        # np.split gives one part where there are no rows
        np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else [],
        request.top_k,
        listed,
        np.split(positions, np.cumsum(counts)[:-1]) if len(counts) else [],
        vocab_size,
    )
    return Wanted(rows, places, request.top_k, listed)


def pack_answer(model: str, scored: Sequence[ScoredRow]) -> bytes:
    """An answer body; all rows have the same fields."""
    fields: dict[str, bytes] = {}
    for name, dtype in DTYPES.items():
        values = [getattr(row, name) for row in scored]
        if values and values[0] is not None:
            fields[name] = b"".join(np.ascontiguousarray(v, dtype=dtype).tobytes() for v in values)
    return msgspec.msgpack.encode(ScoreAnswer(**{"label_log_probs": b"", "entropy": b"", "model": model, **fields}))


def unpack_answer(
    body: bytes, counts: Sequence[int], top_k: int, candidates: int | None
) -> tuple[str, list[ScoredRow]]:
    """The fingerprint, and the rows, of an answer to ``counts[i]`` positions of row i.

    Raises:
        MalformedError: it is no such answer, or an answer to something else.
    """
    try:
        answer = ANSWER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedError(f"the answer is unreadable: {error}") from error
    if answer.version != WIRE_VERSION:
        raise MalformedError(f"the answer has version {answer.version}; expected {WIRE_VERSION}")
    tokens, ends = sum(counts), np.cumsum(counts)[:-1]
    wide = None if candidates is None else (tokens, candidates)
    listed, flat = (tokens, top_k), (tokens,)
    shapes = {
        "label_log_probs": flat,
        "entropy": flat,
        "topk_ids": listed if top_k else None,
        "topk_log_probs": listed if top_k else None,
        "tail_log_mass": flat if top_k else None,
        "candidate_log_probs": wide,
    }
    parts: dict[str, list[np.ndarray]] = {}
    for name, shape in shapes.items():
        buffer = getattr(answer, name)
        expected = None if shape is None else int(np.prod(shape)) * DTYPES[name].itemsize
        if expected != (None if buffer is None else len(buffer)):
            raise MalformedError(
                f"the answer's {name} has {'no' if buffer is None else len(buffer)} bytes; expected "
                f"{'none' if expected is None else expected} for {tokens} tokens"
            )
        if shape is not None and buffer is not None:
            parts[name] = np.split(np.frombuffer(buffer, DTYPES[name]).reshape(shape), ends)
    each: list[dict[str, Any]] = [{name: values[i] for name, values in parts.items()} for i in range(len(counts))]
    return answer.model, [ScoredRow(**fields) for fields in each]


def answer_bytes(tokens: int, top_k: int, candidates: int) -> int:
    """Size of an answer's buffers."""
    return 4 * tokens * (2 + (2 * top_k + 1 if top_k else 0) + candidates)


def _check_sizes(lengths: np.ndarray, counts: np.ndarray, ids: int, positions: int) -> None:
    if len(lengths) != len(counts):
        raise DataError(f"{len(lengths)} lengths and {len(counts)} position_counts; expected one of each a row")
    for name, stated, found in (("token_ids", lengths, ids), ("positions", counts, positions)):
        # lengths come from outside: their sum may not wrap
        if int(stated.sum(dtype=np.uint64)) != found:
            raise DataError(f"{name} holds {found} numbers; expected {int(stated.sum(dtype=np.uint64))}")


def _check_limits(
    lengths: np.ndarray, positions: int, top_k: int, candidates: np.ndarray | None, limits: Limits
) -> None:
    listed = 0 if candidates is None else len(candidates)
    asked = {
        "rows": len(lengths),
        "row_tokens": int(lengths.max(initial=0)),
        "tokens": int(lengths.sum(dtype=np.uint64)),
        "top_k": top_k,
        "candidates": listed,
        "answer_bytes": answer_bytes(positions, max(0, top_k), listed),
    }
    for name, value in asked.items():
        if value > getattr(limits, name):
            kind = HyperparameterError if name in ("top_k", "candidates") else DataError
            raise kind(f"{name} {value} exceeds this server's limit of {getattr(limits, name)}; ask for less at once")


def _array(name: str, buffer: bytes, dtype: str) -> np.ndarray:
    if len(buffer) % np.dtype(dtype).itemsize:
        raise DataError(f"{name} has {len(buffer)} bytes; expected whole {np.dtype(dtype).name} numbers")
    return np.frombuffer(buffer, dtype)


def _lengths(parts: Sequence[np.ndarray]) -> bytes:
    return np.array([len(part) for part in parts], dtype="<u4").tobytes()


def _flat(parts: Sequence[np.ndarray], dtype: str) -> bytes:
    return b"".join(np.ascontiguousarray(part, dtype=dtype).tobytes() for part in parts)
