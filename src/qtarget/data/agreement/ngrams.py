"""Contexts of tokens, counted over all rows but one's own: packed into whole numbers and sorted, part by part.

A context of three tokens fits into 64 bits as it is, so nothing is hashed and nothing can collide: 21 bits a token, which
is a vocabulary of two million. A context and the token after it are told apart by the context's place in the sorted part.
What is counted is exact, whatever the order of the rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qtarget.core.errors import ShapeError

TOKEN_BITS = 21
"""Three tokens in 63 bits; the 64th marks what is no context."""
NOWHERE = np.uint64(2**64 - 1)
"""The key of a token that has no such context: it stands too near to the start of its row."""
CHUNK = 2**22
"""Tokens whose contexts are packed at once."""
PART = 2**23
"""Contexts that are sorted at once; about 100 bytes each."""
IN_MEMORY = 2**24
"""Entries up to which a column is kept in memory; a longer one is a file without a name, in the temporary folder."""
SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio: multiplied by it, near keys fall into different parts."""

Kind = tuple[str, int]
"""``last`` and how many tokens; ``back`` and how far the one token stands; ``depth``: how far into the trained stretch."""


@dataclass(frozen=True)
class FlatTokens:
    """Rows of tokens, one after another.

    Attributes:
        ids: ``[tokens]`` whole numbers below 2**21.
        mask: ``[tokens]`` whether it is trained on; never a row's first.
        offsets: ``[rows + 1]``.

    Raises:
        ShapeError: lengths differ, or an id is out of range.
    """

    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.mask) == self.offsets[-1]:
            raise ShapeError(
                f"{len(self.ids)} tokens, {len(self.mask)} marks, rows of {self.offsets[-1]}; expected equal numbers"
            )
        if len(self.ids) and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < 2**TOKEN_BITS:
            raise ShapeError(
                f"token ids span {self.ids.min()} to {self.ids.max()}; contexts are counted for 0 to {2**TOKEN_BITS - 1:,}"
            )

    @classmethod
    def of(cls, token_ids: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]]) -> FlatTokens:
        """Of lists, one a row; a row's first token is never trained on.

        Raises:
            ShapeError: a row and its mask differ in length, or there is another number of them.
        """
        if len(token_ids) != len(supervised):
            raise ShapeError(f"{len(token_ids)} rows of tokens and {len(supervised)} masks; expected one mask a row")
        for number, (ids, mask) in enumerate(zip(token_ids, supervised, strict=True)):
            if len(ids) != len(mask):
                raise ShapeError(
                    f"row {number + 1} has {len(ids)} tokens and a mask of {len(mask)}; expected equal lengths"
                )
        offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in token_ids], dtype=np.int64)]).astype(np.int64)
        mask = joined(supervised, bool)
        mask[offsets[:-1][np.diff(offsets) > 0]] = False
        return cls(joined(token_ids, np.int32), mask, offsets)

    @cached_property
    def counts(self) -> np.ndarray:
        """``[rows]`` trained tokens of each."""
        out = np.zeros(len(self.offsets) - 1, dtype=np.int64)
        for first, last in self._chunks():  # a sum over all tokens at once would take eight bytes each
            a, b = self.offsets[first], self.offsets[last]
            ends = np.concatenate([[0], np.cumsum(self.mask[a:b])])[self.offsets[first : last + 1] - a]
            out[first:last] = np.diff(ends)
        return out

    @cached_property
    def rows(self) -> np.ndarray:
        """``[trained tokens]`` the row of each."""
        out = scratch(int(self.counts.sum()), np.uint32)
        for first, last, at in self.spans():
            out[at] = np.repeat(np.arange(first, last, dtype=np.uint32), self.counts[first:last])
        return out

    @cached_property
    def trained(self) -> np.ndarray:
        """``[trained tokens]`` the tokens themselves."""
        out = scratch(int(self.counts.sum()), np.uint32)
        for first, last, at in self.spans():
            part = slice(self.offsets[first], self.offsets[last])
            out[at] = self.ids[part][self.mask[part]]
        return out

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """``[trained tokens]`` as one array a row."""
        return np.split(values, np.cumsum(self.counts)[:-1]) if len(self.counts) else []

    def keys(self, kind: Kind) -> np.ndarray:
        """``[trained tokens]`` uint64: each one's context of a kind, ``NOWHERE`` where it has none."""
        out = scratch(len(self.rows), np.uint64)
        for first, last, at in self.spans():
            a, b = self.offsets[first], self.offsets[last]
            out[at] = packed(self.ids[a:b], self.mask[a:b], self.offsets[first : last + 1] - a, kind)
        return out

    def spans(self) -> Iterator[tuple[int, int, slice]]:
        """Ranges of rows of about ``CHUNK`` tokens, and where their trained tokens stand among all trained ones."""
        done = 0
        for first, last in self._chunks():
            end = done + int(self.counts[first:last].sum())
            yield first, last, slice(done, end)
            done = end

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about ``CHUNK`` tokens."""
        first = 0
        while first < len(self.offsets) - 1:
            last = int(np.searchsorted(self.offsets, self.offsets[first] + CHUNK, side="right")) - 1
            last = max(last, first + 1)  # a row longer than that
            yield first, last
            first = last


def joined(lists: Sequence[Any], dtype: Any) -> np.ndarray:
    """Lists one after another."""
    return np.concatenate([np.asarray(values, dtype=dtype) for values in lists]) if len(lists) else np.zeros(0, dtype)


def scratch(size: int, dtype: Any) -> np.ndarray:
    """An array of zeros to be filled, in a file that nobody else sees where it is large."""
    if size <= IN_MEMORY or not size:
        return np.zeros(size, dtype)
    with tempfile.TemporaryFile() as file:  # the mapping keeps what the name no longer shows
        return np.memmap(file, dtype=dtype, mode="w+", shape=(size,))


def packed(ids: np.ndarray, mask: np.ndarray, offsets: np.ndarray, kind: Kind) -> np.ndarray:
    """``FlatTokens.keys`` of some rows.

    Example:
        >>> ids, mask = np.array([7, 8, 9]), np.array([False, True, True])
        >>> packed(ids, mask, np.array([0, 3]), ("back", 1)).tolist()
        [7, 8]
    """
    name, size = kind
    places = np.flatnonzero(mask)
    if name == "depth":
        stretch = np.maximum.accumulate(
            np.where(mask, 0, np.arange(len(mask)))
        )  # the last token that is not trained on
        return (places - stretch[places]).astype(np.uint64)
    key = np.zeros(len(places), dtype=np.uint64)
    for back in range(1, size + 1) if name == "last" else (size,):
        key = (key << np.uint64(TOKEN_BITS)) | ids[np.maximum(places - back, 0)].astype(np.uint64)
    starts = np.repeat(offsets[:-1], np.diff(offsets))[places]
    key[places - starts < size] = NOWHERE
    return key


def in_parts(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of the keys that are somewhere, in parts of about ``PART``; equal keys are in one part, indices ascend."""
    parts = 1 << max(0, int(np.ceil(np.log2(max(1, len(keys)) / PART))))
    if parts == 1:
        yield np.flatnonzero(keys != NOWHERE)
        return
    shift = np.uint64(64 - parts.bit_length() + 1)
    where = np.empty(len(keys), dtype=np.uint8 if parts < 255 else np.uint16)
    for a in range(0, len(keys), CHUNK):
        some = keys[a : a + CHUNK]
        where[a : a + CHUNK] = np.where(some == NOWHERE, parts, (some * SPREAD) >> shift)
    for part in range(parts):
        yield np.flatnonzero(where == part)


@dataclass(frozen=True)
class Sorted:
    """Observations in the order of their keys, those of one key in the order of their rows.

    Attributes:
        order: ``[n]`` which observation stands where.
        group: ``[n]`` number of its key.
        own: ``[n]`` number of its key and row.
    """

    order: np.ndarray
    group: np.ndarray
    own: np.ndarray

    @classmethod
    def by(cls, keys: np.ndarray, rows: np.ndarray) -> Sorted:
        """Of keys ``[n]`` and their rows, which ascend."""
        order = np.argsort(keys, kind="stable")
        new = _changes(keys[order])
        group = _numbered(new)
        new |= _changes(rows[order])
        return cls(order, group, _numbered(new))

    def others(self, weights: np.ndarray | None = None) -> np.ndarray:
        """``[n]`` how many observations of *other* rows have the same key, or their weights' sum.

        Args:
            weights: ``[n]`` in the order of the observations, not of the keys.
        """
        placed = None if weights is None else weights[self.order]
        whole, own = np.bincount(self.group, placed), np.bincount(self.own, placed)
        if weights is None:  # a part may be one context of half of all tokens: four bytes a token less count
            whole, own = whole.astype(np.uint32), own.astype(np.uint32)
        out = whole[self.group]
        out -= own[self.own]
        return out


def _changes(values: np.ndarray) -> np.ndarray:
    """Where another value begins; the first place is one."""
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return new


def _numbered(new: np.ndarray) -> np.ndarray:
    """The number of the stretch that each place is in, from 0."""
    out = np.cumsum(new, dtype=np.int32)
    out -= 1
    return out


Done = Callable[[int], object]
"""Called with the number of contexts that were counted since the last call."""


def largest_shares(flat: FlatTokens, kinds: Sequence[Kind], on_done: Done | None = None) -> np.ndarray:
    """``[trained tokens]`` float32: over contexts of all kinds the largest ``k / (n + 1)`` of other rows' tokens."""
    best = scratch(len(flat.rows), np.float32)
    for kind in kinds:
        for index in in_parts(keys := flat.keys(kind)):
            context = Sorted.by(keys[index], flat.rows[index])
            index, group, same_context = index[context.order], context.group, context.others()
            del context
            key = group.astype(np.uint64)
            key <<= np.uint64(TOKEN_BITS)
            key |= flat.trained[index]
            pair = Sorted.by(key, flat.rows[index])
            del key, group
            index, same_context = index[pair.order], same_context[pair.order]
            share = pair.others().astype(np.float32)
            del pair
            same_context += np.uint32(1)
            share /= same_context
            best[index] = np.maximum(best[index], share)
            if on_done:
                on_done(len(index))
    return best


def first_shares(
    flat: FlatTokens,
    kinds: Sequence[Kind | np.ndarray],
    flags: np.ndarray,
    weights: np.ndarray,
    enough: float,
    on_done: Done | None = None,
) -> np.ndarray:
    """``[trained tokens]`` float32: the weighted share of flagged tokens of other rows, at the first kind that has enough of them.

    Args:
        kinds: contexts, or ``[trained tokens]`` uint64 keys.
        flags, weights: ``[trained tokens]``.
        enough: other rows' weight that a place needs; 0 is the share where no kind has it.
    """
    out, open_ = scratch(len(flags), np.float32), np.ones(len(flags), dtype=bool)
    for kind in kinds:
        for index in in_parts(keys := kind if isinstance(kind, np.ndarray) else flat.keys(kind)):
            found = Sorted.by(keys[index], flat.rows[index])
            weight = weights[index].astype(np.float64)
            seen, against = found.others(weight), found.others(weight * flags[index])
            at = index[found.order]
            told = (seen >= enough) & open_[at]
            out[at[told]] = against[told] / seen[told]
            open_[at[told]] = False
            if on_done:
                on_done(len(index))
    return out
