"""Both layouts by hand, there and back, and what is refused on the way."""

from __future__ import annotations

import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtarget.core.errors import DataError, HyperparameterError
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.sources.identity import Limits
from qtarget.scoring.sources.wire import (
    MalformedError,
    answer_bytes,
    pack_answer,
    pack_request,
    unpack_answer,
    unpack_request,
)

LIMITS = Limits(row_tokens=64)
ROWS, AT = [np.array([5, 9, 3]), np.array([], dtype=int), np.array([7, 8])], [np.array([1, 2]), np.array([]), [1]]


def message(**fields):
    """A request written with struct and msgspec alone."""
    good = {
        "version": 1,
        "lengths": struct.pack("<3I", 3, 0, 2),
        "token_ids": struct.pack("<5i", 5, 9, 3, 7, 8),
        "position_counts": struct.pack("<3I", 2, 0, 1),
        "positions": struct.pack("<3I", 1, 2, 1),
        "top_k": 4,
        "candidate_ids": struct.pack("<2i", 6, 0),
    }
    return {key: value for key, value in {**good, **fields}.items() if value is not ...}


def test_a_request_is_the_documented_map():
    packed = pack_request(ROWS, AT, 4, [6, 0])
    assert msgspec.msgpack.decode(packed) == message()
    wanted = unpack_request(msgspec.msgpack.encode(message()), LIMITS, 10)
    assert [row.tolist() for row in wanted.rows] == [[5, 9, 3], [], [7, 8]]
    assert [at.tolist() for at in wanted.positions] == [[1, 2], [], [1]]
    assert (wanted.top_k, wanted.candidate_ids) == (4, [6, 0])


def test_no_rows_are_a_request():
    wanted = unpack_request(pack_request([], [], 0, None), LIMITS, 10)
    assert (wanted.rows, wanted.positions, wanted.candidate_ids) == ([], [], None)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"version": 2}, DataError, "version is 2, this server speaks 1"),
        ({"top_k": ...}, DataError, "missing required field `top_k`"),
        ({"top_k": "4"}, DataError, "Expected `int`, got `str`"),
        ({"top_k": -1}, HyperparameterError, "top_k=-1"),
        ({"top_k": 2**63}, HyperparameterError, "top_k 9223372036854775808 exceeds this server's limit of 1024"),
        ({"lengths": "abc"}, DataError, "wrong fields"),
        ({"more": 1}, DataError, "unknown field `more`"),
        ({"lengths": b"\x03\x00"}, DataError, "lengths has 2 bytes; expected whole uint32"),
        ({"lengths": struct.pack("<3I", 3, 0, 3)}, DataError, "token_ids holds 5 numbers; expected 6"),
        ({"lengths": struct.pack("<3I", 2**32 - 1, 2**32 - 1, 7)}, DataError, "expected 8589934597"),
        ({"lengths": struct.pack("<2I", 3, 2)}, DataError, "2 lengths and 3 position_counts"),
        ({"positions": struct.pack("<2I", 1, 2)}, DataError, "positions holds 2 numbers; expected 3"),
        ({"positions": struct.pack("<3I", 0, 2, 1)}, DataError, "ascending ones of 1 to 2"),
        ({"positions": struct.pack("<3I", 1, 3, 1)}, DataError, "ascending ones of 1 to 2"),
        ({"token_ids": struct.pack("<5i", 5, 9, 10, 7, 8)}, DataError, "token ids from 5 to 10"),
        ({"token_ids": struct.pack("<5i", 5, 9, -1, 7, 8)}, DataError, "token ids from -1 to 9"),
        ({"candidate_ids": struct.pack("<i", 10)}, HyperparameterError, "candidate_ids"),
    ],
)
def test_what_is_refused(fields, error, words):
    with pytest.raises(error, match=words):
        unpack_request(msgspec.msgpack.encode(message(**fields)), LIMITS, 10)


@pytest.mark.parametrize(
    ("limit", "value", "error"),
    [
        ("rows", 2, DataError),
        ("row_tokens", 2, DataError),
        ("tokens", 4, DataError),
        ("top_k", 3, HyperparameterError),
        ("candidates", 1, HyperparameterError),
        ("answer_bytes", 4 * 3 * (2 + 9 + 2) - 1, DataError),
    ],
)
def test_each_limit(limit, value, error):
    body = msgspec.msgpack.encode(message())
    unpack_request(body, Limits(**{"row_tokens": 3, limit: value + 1}), 10)
    with pytest.raises(error, match=f"{limit} .* exceeds this server's limit of {value}"):
        unpack_request(body, Limits(**{"row_tokens": 3, limit: value}), 10)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_raise(body):
    with pytest.raises((DataError, HyperparameterError)):
        unpack_request(body, LIMITS, 10)


@given(
    st.dictionaries(st.sampled_from(sorted(message())), st.integers() | st.binary(max_size=20) | st.none() | st.text())
)
def test_no_fields_do_more_than_raise(fields):
    try:
        body = msgspec.msgpack.encode(message(**fields))
    except OverflowError:
        return
    try:
        unpack_request(body, LIMITS, 10)
    except (DataError, HyperparameterError):
        return
    assert all(message()[key] == value or key in ("candidate_ids", "top_k") for key, value in fields.items())


def numbers(tokens: int, top_k: int, candidates: int | None, seed: int = 0) -> ScoredRow:
    rng = np.random.default_rng(seed)
    f = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return ScoredRow(
        f(tokens),
        f(tokens),
        rng.integers(0, 99, (tokens, top_k)).astype(np.int32) if top_k else None,
        f(tokens, top_k) if top_k else None,
        f(tokens) if top_k else None,
        None if candidates is None else f(tokens, candidates),
    )


@pytest.mark.parametrize(("top_k", "candidates"), [(0, None), (3, None), (0, 2), (3, 0), (1, 1)])
def test_an_answer_comes_back_bit_by_bit(top_k, candidates):
    rows = [numbers(n, top_k, candidates, n) for n in (2, 0, 5)]
    packed = pack_answer("model", rows)
    model, found = unpack_answer(packed, [2, 0, 5], top_k, candidates)
    assert model == "model"
    for a, b in zip(rows, found, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert (value is None) == (other is None), name
            if value is not None:
                np.testing.assert_array_equal(value, other)
                assert value.dtype == other.dtype
    buffers = [v for v in msgspec.msgpack.decode(packed).values() if isinstance(v, bytes)]
    assert sum(map(len, buffers)) == answer_bytes(7, top_k, candidates or 0)


def test_an_answer_is_little_endian_float32():
    packed = pack_answer("m", [ScoredRow(np.array([-1.5, 2.0], np.float32), np.array([0.25, 0.5], np.float32))])
    answer = msgspec.msgpack.decode(packed)
    assert answer["label_log_probs"] == struct.pack("<2f", -1.5, 2.0)
    assert answer["entropy"] == struct.pack("<2f", 0.25, 0.5)
    assert answer["topk_ids"] is answer["tail_log_mass"] is answer["candidate_log_probs"] is None


@pytest.mark.parametrize(
    ("counts", "top_k", "candidates"), [([3], 2, None), ([2], 3, None), ([2], 0, None), ([2], 2, 1)]
)
def test_an_answer_to_something_else_is_refused(counts, top_k, candidates):
    packed = pack_answer("m", [numbers(2, 2, None)])
    unpack_answer(packed, [2], 2, None)
    with pytest.raises(MalformedError, match="the answer's"):
        unpack_answer(packed, counts, top_k, candidates)


def test_half_an_answer_is_refused():
    packed = pack_answer("m", [numbers(4, 2, None)])
    for cut in range(0, len(packed), 7):
        with pytest.raises(MalformedError, match="unreadable"):
            unpack_answer(packed[:cut], [4], 2, None)
