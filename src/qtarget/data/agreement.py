"""What the other demonstrations say about a token: a witness that needs no model, and can contradict the frozen base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from qtarget.errors import ShapeError

SHORTEST, LONGEST = 1, 3
"""Lengths of the contexts that are compared, in tokens."""
GAPS = (2, 3)
"""A context may also be the single token so many places back: noise in between then hides nothing."""


def agreement(token_ids: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]]) -> list[np.ndarray]:
    """Share of the other rows' continuations that agree with each supervised token, at its most telling context.

    For every context of token ``t`` (the last one to three tokens; the one token two or three places back; how far into
    the supervised stretch it stands) let ``n`` be how often the context precedes a supervised token in *other* rows and
    ``k`` how often that token is ``t``. The agreement is the largest ``k / (n + 1)``: 0 for what no other row says, near
    1 for what all of them say. A wrong token that is drawn at random has almost none, whatever a model thinks of it.

    Args:
        token_ids: the rows, prompt included.
        supervised: of the same lengths; true where a token is trained on. A row's first token never is.

    Returns:
        One float32 array a row, ``[supervised tokens]``, in [0, 1).

    Raises:
        ShapeError: a row and its mask differ in length.

    Example:
        >>> rows, masks = [[7, 7, 1, 2], [8, 8, 1, 2], [9, 9, 1, 2], [9, 9, 1, 3]], [[False, False, True, True]] * 4
        >>> [found.tolist() for found in agreement(rows, masks)]
        [[0.75, 0.5], [0.75, 0.5], [0.75, 0.5], [0.75, 0.0]]

    Reference: ours; leave-one-out n-gram counts with skipped tokens.
    """
    if len(token_ids) != len(supervised):
        raise ShapeError(f"{len(token_ids)} rows of tokens and {len(supervised)} masks; expected one mask a row")
    contexts, pairs = Counter(), Counter()
    rows = [
        _observations(ids, mask, number) for number, (ids, mask) in enumerate(zip(token_ids, supervised, strict=True))
    ]
    for row in rows:
        for found in row:
            contexts.update(context for context, _ in found)
            pairs.update(found)
    return [_shares(row, contexts, pairs) for row in rows]


Observation = tuple[Hashable, int]
"""A context and the token that follows it."""


def _observations(ids: Sequence[int], mask: Sequence[bool], number: int) -> list[list[Observation]]:
    """For each supervised token, each of its contexts with that token."""
    if len(ids) != len(mask):
        raise ShapeError(f"row {number} has {len(ids)} tokens and a mask of {len(mask)}; expected equal lengths")
    out, depth = [], 0
    for place in range(1, len(ids)):
        depth = depth + 1 if mask[place] else 0
        if mask[place]:
            out.append([(context, ids[place]) for context in _contexts(ids, place, depth)])
    return out


def _contexts(ids: Sequence[int], place: int, depth: int) -> Iterator[Hashable]:
    for length in range(SHORTEST, min(LONGEST, place) + 1):
        yield tuple(ids[place - length : place])
    for gap in GAPS:
        if gap <= place:
            yield gap, "back", ids[place - gap]
    yield depth, "in"


def _shares(row: list[list[Observation]], contexts: Counter, pairs: Counter) -> np.ndarray:
    """The row's agreement, its own counts taken out."""
    own_contexts = Counter(context for found in row for context, _ in found)
    own_pairs = Counter(pair for found in row for pair in found)
    return np.array(
        [
            max((pairs[pair] - own_pairs[pair]) / (contexts[pair[0]] - own_contexts[pair[0]] + 1) for pair in found)
            for found in row
        ],
        dtype=np.float32,
    )


def prior_reliability(agreements: np.ndarray, label_log_probs: np.ndarray) -> float:
    """How much of what the demonstrations agree on the frozen base knew before: ``sum A p_ref(y) / sum A``, in [0, 1].

    Near 0 the base has never seen such answers (its format is another one, say), and its opinion of a token says little;
    near 1 it could have written them. Random noise has no agreement, so it hardly moves this number.

    Args:
        agreements: ``[tokens]`` of ``agreement``, all rows of a data set together.
        label_log_probs: ``[tokens]`` of the frozen base, nats.

    Raises:
        ShapeError: the two differ in length, or there are no tokens.

    Example:
        >>> import numpy as np
        >>> round(prior_reliability(np.array([0.9, 0.9, 0.0]), np.log(np.array([0.5, 0.7, 0.001]))), 3)
        0.6
    """
    if len(agreements) != len(label_log_probs) or not len(agreements):
        raise ShapeError(
            f"{len(agreements)} agreements and {len(label_log_probs)} log-probs; expected as many of each, at least one"
        )
    weight = np.asarray(agreements, dtype=np.float64)
    known = np.exp(np.asarray(label_log_probs, dtype=np.float64))
    return float((weight * known).sum() / weight.sum()) if weight.sum() else 0.0
