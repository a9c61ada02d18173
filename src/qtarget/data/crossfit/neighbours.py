"""Does a row contradict its prompt? The same answer, asked of the copy under the prompts that are most alike.

A hard row and a wrong one both surprise a copy that has not seen them. But the right answer to a hard prompt is no likelier
elsewhere; a wrong one often is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PROMPTS = 6
"""Other prompts that each answer is asked under."""
CANDIDATES = 512
"""Prompts among which the most alike are looked for, drawn by seed where there are more."""
AT_ONCE = 2**16
"""Tokens that are compared at once."""
MOST = 20.0
"""Nats beyond which a contradiction is no larger."""


def nearest_prompts(prompts: Sequence[np.ndarray], seed: int = 0) -> np.ndarray:
    """Of each prompt the other prompts that share most tokens with it, by the cosine of their sets of tokens.

    Args:
        prompts: token ids of each row's prompt; equal ones are never each other's neighbours.
        seed: of the candidates.

    Returns:
        ``[rows, PROMPTS]`` places of rows, the nearest first; -1 where there are fewer.

    Example:
        >>> found = nearest_prompts([np.array([1, 2, 3]), np.array([1, 2, 4]), np.array([7, 8]), np.array([1, 2, 3])])
        >>> found[0, :3].tolist()
        [1, 2, -1]
    """
    same: dict[bytes, int] = {}  # equal prompts by the first of them
    group = np.array([same.setdefault(row.astype("<i8").tobytes(), i) for i, row in enumerate(prompts)], dtype=np.int64)
    pool = np.unique(group)
    if len(pool) > CANDIDATES:
        pool = np.sort(np.random.default_rng(seed).choice(pool, CANDIDATES, replace=False))
    sets = [np.unique(row) for row in prompts]
    tokens, places = np.unique(np.concatenate([np.zeros(0, np.int64), *sets]), return_inverse=True)
    sizes = np.array([len(row) for row in sets])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    has = np.zeros((len(tokens) + 1, len(pool)), dtype=np.float32)  # the last line is of no token
    for column, row in enumerate(pool.tolist()):
        has[places[starts[row] : starts[row + 1]], column] = 1
    norms = np.sqrt(np.maximum(sizes, 1))
    out = np.full((len(prompts), PROMPTS), -1, dtype=np.int64)
    at = 0
    while at < len(prompts):
        end = max(at + 1, int(np.searchsorted(starts, starts[at] + AT_ONCE * 8 // max(len(pool), 1), side="right")) - 1)
        shared = np.stack([has[places[starts[row] : starts[row + 1]]].sum(0) for row in range(at, end)])
        alike = shared / (norms[at:end, None] * norms[pool][None])
        alike[group[at:end, None] == pool[None]] = -1
        order = np.argsort(-alike, axis=1, kind="stable")[:, :PROMPTS]
        found = np.where(np.take_along_axis(alike, order, 1) < 0, -1, pool[order])
        out[at:end, : found.shape[1]] = found
        at = end
    return out


def contradiction(own: np.ndarray, elsewhere: np.ndarray) -> np.ndarray:
    """Nats by which the best of the other prompts makes a row's answer likelier than its own prompt, cut to ``MOST``.

    Args:
        own: ``[rows]`` log-prob of the whole answer under its prompt, nats.
        elsewhere: ``[rows, prompts]`` under other prompts; -inf where there is none.

    Example:
        >>> contradiction(np.array([-1.0, -9.0]), np.array([[-5.0, -4.0], [-3.0, -8.0]])).tolist()
        [-3.0, 6.0]
    """
    best = np.max(elsewhere, axis=1, initial=-np.inf)
    return np.clip(np.where(np.isfinite(best), best - own, -MOST), -MOST, MOST)
