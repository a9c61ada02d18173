"""Integers of any width in a string of bits, most significant first."""

from __future__ import annotations

import numpy as np


def pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Pack ``[rows, n]`` integers below ``2**width`` into ``[rows, ceil(n width / 8)]`` bytes.

    Example:
        >>> pack_bits(np.array([[1, 2]]), 3)
        array([[40]], dtype=uint8)
    """
    places = np.arange(width - 1, -1, -1)
    bits = (values.astype(np.int64)[..., None] >> places & 1).astype(np.uint8)
    return np.packbits(bits.reshape(len(values), values.shape[1] * width), axis=1)


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """The inverse: ``[rows, count]`` int64 from ``[rows, bytes]``."""
    bits = np.unpackbits(packed, axis=1)[:, : count * width].reshape(len(packed), count, width)
    return bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))
