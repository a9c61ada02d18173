"""Numbers in one byte: a page of millions of tokens must travel. Page and JSON hold the same rounded numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ABSENT_CODE = 255
LEVELS = 255


@dataclass(frozen=True)
class Codes:
    """``values[codes]``; code 255 is "no value".

    Attributes:
        codes: uint8, any shape.
        values: ``[255]`` the numbers, six significant digits.
    """

    codes: np.ndarray
    values: list[float]

    @property
    def decoded(self) -> np.ndarray:
        """The rounded numbers; NaN where there is none."""
        return np.array([*self.values, np.nan])[self.codes]

    def rows(self, index: np.ndarray) -> Codes:
        """The same for some elements."""
        return Codes(self.codes[index], self.values)


def six(value: float) -> float:
    """Six significant digits.

    Example:
        >>> six(0.123456789)
        0.123457
    """
    return float(f"{value:.6g}")


def quantise(numbers: np.ndarray) -> Codes:
    """Round to 255 levels between the smallest number (at most 0) and the largest; NaN has none.

    Levels lie on a square scale, finest at zero, where numbers are of one sign (weights, nats), and evenly otherwise.

    Example:
        >>> quantise(np.array([0.0, 1.0, np.nan])).codes.tolist()
        [0, 254, 255]
    """
    known = np.isfinite(numbers)
    low, high = (float(f(numbers, where=known, initial=0.0)) for f in (np.min, np.max))
    top = LEVELS - 1
    if low < 0 < high:
        scale = (high - low) / top
        levels = low + np.arange(LEVELS) * scale
        codes = np.rint((np.where(known, numbers, 0.0) - low) / scale)
    else:
        edge = high if high > 0 else low
        levels = edge * (np.arange(LEVELS) / top) ** 2
        share = np.where(known, numbers, 0.0) / (edge or 1.0)
        codes = np.rint(np.sqrt(share.clip(0, 1)) * top)
    codes = np.where(known, codes, ABSENT_CODE).astype(np.uint8)
    return Codes(codes, [six(v) for v in levels])
