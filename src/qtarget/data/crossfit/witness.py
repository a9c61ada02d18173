"""What a cross-fit says of the rows: how much of them is noise, and how far the frozen base may be believed about them.

A cross-fitted copy (`qtarget score --crossfit`) knows the format of the rows and has not seen this one. What it gives no
probability is a drawn token, or a fact that stands nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qtarget.core.errors import ShapeError
from qtarget.core.types import WITNESS_FIELDS
from qtarget.targets.crossfit_consensus import NOISE_DENSITY


def belief(log_probs: np.ndarray) -> np.ndarray:
    """How far a token is no noise, by a copy that has not seen it: ``p / (p + 0.01)``, which is 1/2 at `NOISE_DENSITY`.

    Args:
        log_probs: of the labels under the copy, nats.

    Example:
        >>> belief(np.log(np.array([0.99, 0.01, 0.0001]))).round(2).tolist()
        [0.99, 0.5, 0.01]
    """
    p = np.exp(np.asarray(log_probs, dtype=np.float64))
    return p / (p + NOISE_DENSITY)


@dataclass(frozen=True)
class Verdict:
    """What a cross-fit says of some rows together.

    Attributes:
        perplexity_ratio: of the copies to the base, at most 1, over tokens as far as they are believed: 1 where the base
            expects the rows as well as a copy that was trained on such rows, near 0 where it does not know their format.
        noise_tokens: mean doubt ``1 - belief`` of the tokens.
        noise_rows: mean over rows of the largest doubt in each: two wrong tokens in a row make it a wrong row.
    """

    perplexity_ratio: float
    noise_tokens: float
    noise_rows: float

    def words(self, doubted: bool = False) -> str:
        """The verdict for people; no shares where the copies' word is ``doubted``.

        Example:
            >>> said = Verdict(0.0004, 0.05, 0.2).words()
            >>> said.partition(":")[0]
            'the copies hardly expect about 5.0% of tokens, and about 20.0% of rows have such a token'
            >>> said.partition("; ")[2]
            'the other tokens are 2,500 times likelier to them than to the base'
        """
        times = f"{1 / max(self.perplexity_ratio, 1e-4):,.{int(self.perplexity_ratio > 0.1)}f} times likelier"
        times = "more than 10,000 times likelier" if self.perplexity_ratio < 1e-4 else times
        likelier = f"are {times if self.perplexity_ratio < 1 else 'no likelier'} to them than to the base"
        if doubted:
            return f"how much is noise, nobody can tell; tokens that the copies expect {likelier}"
        return (
            f"the copies hardly expect about {self.noise_tokens:.1%} of tokens, and about {self.noise_rows:.1%} of rows have such "
            "a token: "
            f"noise, or what no other row teaches; the other tokens {likelier}"
        )


def verdict(base_log_probs: np.ndarray, crossfit_log_probs: np.ndarray, rows: np.ndarray) -> Verdict:
    """Judge rows by what base and copies say of their labels.

    Args:
        base_log_probs, crossfit_log_probs: ``[tokens]``, nats.
        rows: ``[tokens]`` which row each is of, ascending.

    Raises:
        ShapeError: the three differ in length, or there are no tokens.

    Example:
        >>> verdict(np.log([0.1, 0.1, 0.1]), np.log([0.4, 0.4, 1e-6]), np.array([0, 0, 1]))
        Verdict(perplexity_ratio=0.2502, noise_tokens=0.3496, noise_rows=0.5121)
    """
    if not len(base_log_probs) == len(crossfit_log_probs) == len(rows) or not len(rows):
        raise ShapeError(
            f"{len(base_log_probs)} log-probs of the base, {len(crossfit_log_probs)} of the copies, {len(rows)} rows; expected as "
            "many of each, at least one"
        )
    believed = belief(crossfit_log_probs)
    ahead = np.asarray(crossfit_log_probs, np.float64) - np.asarray(base_log_probs, np.float64)
    nats = float((believed * ahead).sum() / believed.sum()) if believed.sum() else 0.0
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
    worst = np.maximum.reduceat(1 - believed, starts)
    return Verdict(
        round(float(np.exp(-max(0.0, nats))), 4), round(float(1 - believed.mean()), 4), round(float(worst.mean()), 4)
    )


def witness_fields(
    base_log_probs: np.ndarray,
    crossfit_log_probs: np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], dict[int, Verdict]]:
    """``WITNESS_FIELDS`` of a ``Reference``, ``[tokens]`` float32 each, and the verdict on each group of rows.

    Args:
        base_log_probs, crossfit_log_probs, rows: as for ``verdict``.
        groups: ``[tokens]`` the source of each token's row; each source has a verdict of its own. Absent: one for all.

    Raises:
        ShapeError: see ``verdict``.
    """
    group = np.zeros(len(rows), dtype=np.int64) if groups is None else groups
    out = {name: np.zeros(len(rows), dtype=np.float32) for name in WITNESS_FIELDS}
    out["crossfit"][:] = np.exp(np.asarray(crossfit_log_probs, dtype=np.float64))
    verdicts = {}
    for number in np.unique(group).tolist():
        at = group == number
        verdicts[number] = found = verdict(base_log_probs[at], crossfit_log_probs[at], rows[at])
        for name, value in vars(found).items():
            out[name][at] = value
    return out, verdicts
