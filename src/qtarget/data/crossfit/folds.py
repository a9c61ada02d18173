"""Rows in folds by prompt, so that no model judges a row whose prompt it was trained on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from qtarget.core.errors import DataError, ShapeError


def prompt_key(token_ids: Sequence[int] | np.ndarray, supervised: Sequence[bool] | np.ndarray) -> bytes:
    """What two rows share when they ask the same: all before the first supervised token, or the whole row without such.

    Args:
        token_ids: one row.
        supervised: true where a token is trained on; a row's first token never is.

    Example:
        >>> prompt_key([5, 6, 7], [False, False, True]) == prompt_key([5, 6, 8, 9], [False, False, True, True])
        True
    """
    ids, places = np.asarray(token_ids, dtype=np.int64), np.flatnonzero(supervised)
    # one token before it is a start token, or a text's first: such rows have no prompt
    asked = ids[: places[0]] if len(places) and places[0] > 1 else ids
    return hashlib.blake2b(asked.astype("<i8").tobytes(), digest_size=16).digest()


def assign_folds(keys: Sequence[bytes], folds: int, seed: int = 0) -> np.ndarray:
    """The fold of each row: rows of one key together, folds as even as that allows, the same whatever the rows' order.

    Args:
        keys: of each row, such as ``prompt_key``.
        folds: how many, at least 2.
        seed: of the order in which groups are dealt out.

    Returns:
        ``[rows]`` int64, from 0 to ``folds - 1``.

    Raises:
        ShapeError: fewer than two folds.
        DataError: fewer different keys than folds: a fold would be empty.

    Example:
        >>> assign_folds([b"a", b"b", b"a", b"c"], 2).tolist()
        [0, 1, 0, 1]
    """
    if folds < 2:
        raise ShapeError(
            f"{folds} folds; expected at least 2: a row is judged by a copy that was trained on the others"
        )
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    if len(groups) < folds:
        raise DataError(
            f"{len(groups)} different prompts for {folds} folds; rows of one prompt stay together, so give at least as "
            "many prompts as folds"
        )

    def drawn(key: bytes) -> bytes:
        return hashlib.blake2b(key, key=str(seed).encode(), digest_size=16).digest()

    out, sizes = np.zeros(len(keys), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    # large groups first, or the last one dealt could unbalance the folds
    for key in sorted(groups, key=lambda key: (-len(groups[key]), drawn(key))):
        fold = int(sizes.argmin())
        out[groups[key]] = fold
        sizes[fold] += len(groups[key])
    return out
