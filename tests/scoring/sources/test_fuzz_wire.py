"""Whatever comes over the wire is a message or a named error: no other exception, in either direction."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qtarget.core.errors import DataError, QTargetError
from qtarget.scoring.sources.identity import Limits
from qtarget.scoring.sources.wire import MalformedError, pack_answer, pack_request, unpack_answer, unpack_request
from tests.scoring.helpers import VOCAB, HashSource

LIMITS = Limits(rows=8, row_tokens=64, tokens=128, top_k=8, candidates=8, answer_bytes=2**16)
ROWS, PLACES = [np.array([3, 4, 5]), np.array([6, 7])], [np.array([1, 2]), np.array([1])]
REQUEST = msgspec.msgpack.decode(pack_request(ROWS, PLACES, 3, [1, 2]))
ANSWER = msgspec.msgpack.decode(pack_answer("model", HashSource(3).score(ROWS, 3, positions=PLACES)))

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=6) | st.binary(max_size=24),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def request_or_refusal(body: bytes) -> None:
    try:
        wanted = unpack_request(body, LIMITS, VOCAB)
    except QTargetError:  # anything else fails the test
        return
    assert len(wanted.rows) == len(wanted.positions) <= LIMITS.rows
    assert all(len(row) == 0 or (row.min() >= 0 and row.max() < VOCAB) for row in wanted.rows)
    assert 0 <= wanted.top_k <= LIMITS.top_k


def answer_or_refusal(body: bytes) -> None:
    try:
        _, rows = unpack_answer(body, [2, 1], 3, None)
    except QTargetError:
        return
    assert [len(row.label_log_probs) for row in rows] == [2, 1]


@st.composite
def changed(draw: Any, good: dict[str, Any]) -> bytes:
    """A message of which one or two fields hold anything, or are gone, and perhaps a byte is flipped or the end cut off."""
    value = dict(good)
    for name in draw(st.lists(st.sampled_from([*sorted(good), "other"]), min_size=1, max_size=2, unique=True)):
        if draw(st.booleans()):
            value[name] = draw(ANYTHING)
        else:
            value.pop(name, None)
    body = bytearray(msgspec.msgpack.encode(value))
    if draw(st.booleans()):
        body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body[: draw(st.sampled_from([len(body), len(body) // 2]))])


def test_the_messages_are_good_to_begin_with() -> None:
    request_or_refusal(msgspec.msgpack.encode(REQUEST))
    assert unpack_request(msgspec.msgpack.encode(REQUEST), LIMITS, VOCAB).top_k == 3
    assert unpack_answer(msgspec.msgpack.encode(ANSWER), [2, 1], 3, None)[0] == "model"


@settings(max_examples=400)
@given(body=st.binary(max_size=80))
@example(body=b"")
@example(body=b"\x81" * 5000)
@example(body=b"\x91" * 100_000)
@example(body=b"\xdf\xff\xff\xff\xff")
def test_any_bytes(body: bytes) -> None:
    request_or_refusal(body)
    answer_or_refusal(body)


@settings(max_examples=400)
@given(body=changed(REQUEST))
def test_any_request(body: bytes) -> None:
    request_or_refusal(body)


@settings(max_examples=400)
@given(body=changed(ANSWER))
def test_any_answer(body: bytes) -> None:
    answer_or_refusal(body)


@pytest.mark.parametrize("wrong", [VOCAB, -1])
def test_an_id_just_outside_the_vocabulary(wrong: int) -> None:
    body = pack_request([np.array([3, wrong])], [np.array([1])], 0, None)
    with pytest.raises(DataError, match=f"the model knows 0 to {VOCAB - 1}"):
        unpack_request(body, LIMITS, VOCAB)


def test_one_byte_too_many_or_too_few() -> None:
    for change in (lambda b: b[:-4], lambda b: b + b"\0\0\0\0", lambda b: b + b"\0"):
        with pytest.raises(DataError, match="token_ids"):
            unpack_request(msgspec.msgpack.encode(REQUEST | {"token_ids": change(REQUEST["token_ids"])}), LIMITS, VOCAB)
        with pytest.raises(MalformedError, match="the answer's entropy"):
            unpack_answer(msgspec.msgpack.encode(ANSWER | {"entropy": change(ANSWER["entropy"])}), [2, 1], 3, None)
