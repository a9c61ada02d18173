"""What the other demonstrations say about a token: a witness that needs no model, and can contradict the frozen base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from qtarget.composed.guarded import SUPPORT
from qtarget.core.errors import ShapeError
from qtarget.core.types import DATA_FIELDS

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
    contexts, pairs = Counter(), Counter()
    for row in _rows(token_ids, supervised):
        for found in row:
            contexts.update(context for context, _ in found)
            pairs.update(found)
    return [_shares(row, contexts, pairs) for row in _rows(token_ids, supervised)]


Context = tuple[str, tuple[int, ...]]
"""What a place is made of (``last``, ``back`` or ``depth`` tokens, or what the base ``said``) and its numbers."""
Observation = tuple[Context, int]
"""A context and the token that follows it."""


def _rows(
    token_ids: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]]
) -> Iterator[list[list[Observation]]]:
    """Each row's ``_observations``, made anew at each pass: kept, they would fill a kilobyte a token."""
    if len(token_ids) != len(supervised):
        raise ShapeError(f"{len(token_ids)} rows of tokens and {len(supervised)} masks; expected one mask a row")
    for number, (ids, mask) in enumerate(zip(token_ids, supervised, strict=True)):
        if len(ids) != len(mask):
            raise ShapeError(f"row {number} has {len(ids)} tokens and a mask of {len(mask)}; expected equal lengths")
        yield _observations(np.asarray(ids).tolist(), mask)


def _observations(ids: list[int], mask: Sequence[bool]) -> list[list[Observation]]:
    """For each supervised token, each of its contexts with that token."""
    out, depth = [], 0
    for place in range(1, len(ids)):
        depth = depth + 1 if mask[place] else 0
        if mask[place]:
            out.append([(context, ids[place]) for context in _contexts(ids, place, depth)])
    return out


def _contexts(ids: list[int], place: int, depth: int) -> Iterator[Context]:
    for length in range(min(LONGEST, place), SHORTEST - 1, -1):
        yield "last", tuple(ids[place - length : place])
    for gap in GAPS:
        if gap <= place:
            yield "back", (gap, ids[place - gap])
    yield "depth", (depth,)


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


TOKENS_BEFORE = 3
"""How far back a token's context is looked at for noise."""


def context_trust(agreements: np.ndarray) -> np.ndarray:
    """How far the tokens before each are what others say: the product of ``A / (A + 0.02)`` over the last three, in [0, 1].

    After noise a base is surprised by a right label too, which says nothing of the base. What stands before the first
    supervised token, the prompt, counts as trusted.

    Args:
        agreements: ``[supervised tokens]`` of ``agreement``, one row.

    Example:
        >>> import numpy as np
        >>> context_trust(np.array([0.98, 0.0, 0.98, 0.98, 0.98, 0.98])).round(2).tolist()
        [1.0, 0.98, 0.0, 0.0, 0.0, 0.94]
    """
    credible, trust = agreements / (agreements + SUPPORT), np.ones_like(agreements)
    for back in range(1, min(TOKENS_BEFORE, len(trust) - 1) + 1):
        trust[back:] *= credible[:-back]
    return trust


def prior_reliability(agreements: np.ndarray, label_log_probs: np.ndarray, trust: np.ndarray | None = None) -> float:
    """How much of what the demonstrations agree on the frozen base knew before: ``sum c A p_ref(y) / sum c A``, in [0, 1].

    Near 0 the base has never seen such answers (its format is another one, say), and its opinion of a token says little;
    near 1 it could have written them. Random noise has no agreement, and tokens after noise no trust ``c``, so it hardly
    moves this number.

    Args:
        agreements: ``[tokens]`` of ``agreement``, all rows of a data set together.
        label_log_probs: ``[tokens]`` of the frozen base, nats.
        trust: ``[tokens]`` of ``context_trust``; 1 without.

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
    weight = np.asarray(agreements, dtype=np.float64) * (1.0 if trust is None else trust)
    known = np.exp(np.asarray(label_log_probs, dtype=np.float64))
    return float((weight * known).sum() / weight.sum()) if weight.sum() else 0.0


SURPRISING = 0.1
"""Probability under the frozen base below which a label counts as one that the base did not expect."""
CONFIDENT = 0.5
"""Probability from which on its first choice is what the base says."""
WITNESSES = 2.5
"""Tokens of other rows, each as far as its context is trusted, that a place needs: three that nearly everybody would trust."""
SOME, MOST = 0.6, 0.8
"""Share of surprising rows at which a place begins to contradict the base, and at which it does so wholly."""


def confident_choices(topk_ids: np.ndarray, topk_log_probs: np.ndarray) -> np.ndarray:
    """What the frozen base says at each token, where it is sure: its first choice if that has half of the mass, else -1.

    Args:
        topk_ids, topk_log_probs: ``[tokens, k]``, in any order; nats.

    Returns:
        ``[tokens]``, int64.

    Example:
        >>> import numpy as np
        >>> confident_choices(np.array([[7, 8], [7, 8]]), np.log(np.array([[0.9, 0.05], [0.3, 0.2]]))).tolist()
        [7, -1]
    """
    first = topk_log_probs.argmax(-1)[:, None]
    sure = np.take_along_axis(topk_log_probs, first, -1)[:, 0] >= np.log(CONFIDENT) - 1e-3  # stored in half precision
    return np.where(sure, np.take_along_axis(topk_ids, first, -1)[:, 0], -1).astype(np.int64)


def prior_conflict(
    token_ids: Sequence[Sequence[int]],
    supervised: Sequence[Sequence[bool]],
    label_log_probs: Sequence[np.ndarray],
    choices: Sequence[np.ndarray] | None = None,
    trust: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Where the demonstrations contradict the frozen base: ``(share - 0.6) / 0.2``, cut to [0, 1].

    ``share`` is how many of the *other* rows' tokens surprise the base in the same place, each counted as far as what stands
    before it is trusted. Noise surprises it now and then, a flawed or missing prior nearly always: a share up to 0.6 counts
    nothing, from 0.8 on it counts in full. A token stands in two places, of which the more contradicted counts: its context
    (the longest one, of at most three tokens, that three trusted tokens in other rows have), which shows what the base does
    not know of a phrase; and among the tokens at which the base is sure of the same choice, which shows a bias that it has
    everywhere. Without a place there is no conflict.

    Args:
        token_ids, supervised: as for ``agreement``.
        label_log_probs: ``[supervised tokens]`` of the frozen base a row, nats.
        choices: ``[supervised tokens]`` a row, of ``confident_choices``; without them contexts alone are compared.
        trust: ``[supervised tokens]`` a row, of ``context_trust``; 1 without.

    Raises:
        ShapeError: a row has another number of numbers than supervised tokens, or a list another number of rows.

    Example:
        >>> import numpy as np
        >>> rows, masks = [[5, 7, 7, 1]] * 5, [[False, False, False, True]] * 5
        >>> unexpected = [np.array([-9.0])] * 5  # the base thinks nothing of what all rows say
        >>> [found.tolist() for found in prior_conflict(rows, masks, unexpected)]
        [[1.0], [1.0], [1.0], [1.0], [1.0]]
    """
    surprised = [np.asarray(values) < np.log(SURPRISING) for values in label_log_probs]
    said = [np.full(len(flags), -1) for flags in surprised] if choices is None else choices
    trusted = [np.ones(len(flags)) for flags in surprised] if trust is None else trust
    for name, found in (("log-probs", surprised), ("choices", said), ("trust", trusted)):
        if len(token_ids) != len(found):
            raise ShapeError(f"{len(token_ids)} rows of tokens, {len(found)} of {name}; expected as many of each")
        for number, (mask, values) in enumerate(zip(supervised, found, strict=True)):
            if (count := sum(mask[1:])) != len(values):
                raise ShapeError(f"row {number}: {count} supervised tokens and {len(values)} {name}; expected as many")
    rows = list(zip(surprised, trusted, strict=True))
    seen, against = Counter(), Counter()
    for places, row in zip(_placed(token_ids, supervised, said), rows, strict=True):
        _count(places, *row, seen, against)
    return [
        _conflicts(places, *row, seen, against)
        for places, row in zip(_placed(token_ids, supervised, said), rows, strict=True)
    ]


Places = tuple[list[Context], list[Context]]
"""Where a token stands: its contexts, longest first, and the base's choice, if it is sure of one."""


def _placed(
    token_ids: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]], said: Sequence[np.ndarray]
) -> Iterator[list[Places]]:
    """Where the tokens of each row stand."""
    for row, chosen in zip(_rows(token_ids, supervised), said, strict=True):
        plain = [[context for context, _ in found if context[0] == "last"] for found in row]
        sure: list[list[Context]] = [[("said", (int(choice),))] if choice >= 0 else [] for choice in chosen]
        yield list(zip(plain, sure, strict=True))


def _count(places: list[Places], flags: np.ndarray, trust: np.ndarray, seen: Counter, against: Counter) -> None:
    for (contexts, said), flag, weight in zip(places, flags.tolist(), trust.tolist(), strict=True):
        for place in (*contexts, *said):
            seen[place] += weight
            against[place] += weight * flag


def _conflicts(
    places: list[Places], flags: np.ndarray, trust: np.ndarray, seen: Counter, against: Counter
) -> np.ndarray:
    """The conflict at each token, the row's own tokens taken out."""
    own_seen, own_against = Counter(), Counter()
    _count(places, flags, trust, own_seen, own_against)

    def share(candidates: list[Context]) -> float:
        """Of the first candidate with enough witnesses."""
        for place in candidates:
            if (others := seen[place] - own_seen[place]) >= WITNESSES:
                return (against[place] - own_against[place]) / others
        return 0.0

    shares = np.array([max(share(contexts), share(said)) for contexts, said in places], dtype=np.float32)
    return np.clip((shares - SOME) / (MOST - SOME), 0, 1)


def counted_fields(
    token_ids: Sequence[Sequence[int]],
    supervised: Sequence[Sequence[bool]],
    label_log_probs: Sequence[np.ndarray],
    fields: frozenset[str],
    choices: Sequence[np.ndarray] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Those of ``DATA_FIELDS`` that are named, as a ``Reference`` holds them: ``[supervised tokens]`` a row each.

    Args:
        token_ids, supervised, label_log_probs, choices: as for ``prior_conflict``.
        fields: what a target needs of the frozen model; names of other fields are passed over.

    Raises:
        ShapeError: see ``agreement`` and ``prior_conflict``.

    Example:
        >>> import numpy as np
        >>> rows, masks, known = [[5, 7, 1]] * 4, [[False, False, True]] * 4, [np.array([-9.0])] * 4
        >>> {name: float(values[0][0]) for name, values in counted_fields(rows, masks, known, frozenset({"agreement"})).items()}
        {'agreement': 0.75}
    """
    wanted = fields & set(DATA_FIELDS)
    if not wanted:
        return {}
    agreed = agreement(token_ids, supervised)
    trust = [context_trust(values) for values in agreed]
    conflicts = prior_conflict(token_ids, supervised, label_log_probs, choices, trust)
    rho = prior_reliability(*(np.concatenate(values) for values in (agreed, label_log_probs, trust)))
    found = {"agreement": agreed, "conflict": conflicts, "reliability": [rho * (1 - values) for values in conflicts]}
    return {name: values for name, values in found.items() if name in wanted}
