"""What the other demonstrations say about a token: a witness that needs no model, and can contradict the frozen base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from qtarget.composed.guarded import SUPPORT
from qtarget.core.errors import ShapeError
from qtarget.core.types import COUNTED_FIELDS
from qtarget.data.agreement.ngrams import NOWHERE, Done, FlatTokens, Kind, first_shares, joined, largest_shares, scratch

SHORTEST, LONGEST = 1, 3
"""Lengths of the contexts that are compared, in tokens."""
GAPS = (2, 3)
"""A context may also be the single token so many places back: noise in between then hides nothing."""
KINDS: tuple[Kind, ...] = (
    *(("last", length) for length in range(SHORTEST, LONGEST + 1)),
    *(("back", gap) for gap in GAPS),
    ("depth", 0),
)


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

    Reference: ours; exact leave-one-out n-gram counts with skipped tokens (`qtarget.data.agreement.ngrams`).
    """
    flat = FlatTokens.of(token_ids, supervised)
    return flat.split(largest_shares(flat, KINDS))


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
    trusted = [np.ones(len(flags)) for flags in surprised] if trust is None else trust
    flat = FlatTokens.of(token_ids, supervised)
    for name, found in (
        ("log-probs", surprised),
        ("choices", surprised if choices is None else choices),
        ("trust", trusted),
    ):
        _check_counts(flat, name, found)
    said = None if choices is None else joined(choices, np.int64)
    return flat.split(_conflicts(flat, joined(surprised, bool), joined(trusted, np.float64), said))


def _check_counts(flat: FlatTokens, name: str, found: Sequence[np.ndarray]) -> None:
    if len(flat.counts) != len(found):
        raise ShapeError(f"{len(flat.counts)} rows of tokens, {len(found)} of {name}; expected as many of each")
    for number, (count, values) in enumerate(zip(flat.counts.tolist(), found, strict=True)):
        if count != len(values):
            raise ShapeError(f"row {number + 1}: {count} supervised tokens and {len(values)} {name}; expected as many")


def _conflicts(
    flat: FlatTokens, surprised: np.ndarray, trust: np.ndarray, said: np.ndarray | None, on_done: Done | None = None
) -> np.ndarray:
    """``prior_conflict`` of flat rows, ``[supervised tokens]`` each."""
    kinds: list[Kind | np.ndarray] = [("last", length) for length in range(LONGEST, SHORTEST - 1, -1)]
    share = first_shares(flat, kinds, surprised, trust, WITNESSES, on_done)
    if said is not None:
        sure = scratch(len(said), np.uint64)
        for _, _, at in flat.spans():
            sure[at] = np.where(said[at] >= 0, said[at].astype(np.uint64), NOWHERE)
        np.maximum(share, first_shares(flat, [sure], surprised, trust, WITNESSES, on_done), out=share)
    for _, _, at in flat.spans():
        share[at] = np.clip((share[at] - SOME) / (MOST - SOME), 0, 1)
    return share


def counted_fields(
    token_ids: Sequence[Sequence[int]],
    supervised: Sequence[Sequence[bool]],
    label_log_probs: Sequence[np.ndarray],
    fields: frozenset[str],
    choices: Sequence[np.ndarray] | None = None,
) -> dict[str, list[np.ndarray]]:
    """Those of ``COUNTED_FIELDS`` that are named, as a ``Reference`` holds them: ``[supervised tokens]`` a row each.

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
    wanted = fields & set(COUNTED_FIELDS)
    if not wanted:
        return {}
    flat = FlatTokens.of(token_ids, supervised)
    for name, found in (("log-probs", label_log_probs), ("choices", choices)):
        if found is not None:
            _check_counts(flat, name, found)
    said = None if choices is None else joined(choices, np.int64)
    return {
        name: flat.split(values)
        for name, values in counted_flat(flat, joined(label_log_probs, np.float64), wanted, said).items()
    }


def counted_flat(
    flat: FlatTokens,
    label_log_probs: np.ndarray,
    fields: frozenset[str],
    choices: np.ndarray | None = None,
    on_done: Done | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """``counted_fields`` of rows one after another, ``[supervised tokens]`` each: no Python object a token.

    Args:
        groups: ``[supervised tokens]`` the source of each token's row: each source has a reliability of its own. What rows
            agree on is counted over all of them.
        on_done: called with the number of contexts counted since the last call, of ``contexts_of(flat)`` in all at most.
    """
    agreed = largest_shares(flat, KINDS, on_done)
    trust = _trusts(agreed, flat)
    conflict = _conflicts(flat, label_log_probs < np.log(SURPRISING), trust, choices, on_done)
    found = {"agreement": agreed, "conflict": conflict}
    if "reliability" in fields:
        found["reliability"] = _reliabilities(flat, agreed, label_log_probs, trust, conflict, groups)
    return {name: values for name, values in found.items() if name in fields}


def _reliabilities(
    flat: FlatTokens,
    agreed: np.ndarray,
    label_log_probs: np.ndarray,
    trust: np.ndarray,
    conflict: np.ndarray,
    groups: np.ndarray | None,
) -> np.ndarray:
    """``prior_reliability`` of each group less the conflict, ``[supervised tokens]`` float32; summed part by part."""
    known, weight, numbers = defaultdict(float), defaultdict(float), groups
    for _, _, at in flat.spans():
        weights = agreed[at].astype(np.float64) * trust[at]
        knew = weights * np.exp(label_log_probs[at].astype(np.float64))
        for group in [0] if numbers is None else np.unique(numbers[at]).tolist():
            mine = slice(None) if numbers is None else numbers[at] == group
            known[group] += float(knew[mine].sum())
            weight[group] += float(weights[mine].sum())
    out = scratch(len(agreed), np.float32)
    for _, _, at in flat.spans():
        for group, total in weight.items():
            mine = slice(None) if numbers is None else numbers[at] == group
            out[at][mine] = (1 - conflict[at][mine]) * (known[group] / total if total else 0.0)
    return out


def contexts_of(flat: FlatTokens) -> int:
    """How many contexts ``counted_flat`` counts, at most."""
    return len(flat.rows) * (len(KINDS) + LONGEST - SHORTEST + 2)


def _trusts(agreements: np.ndarray, flat: FlatTokens) -> np.ndarray:
    """``context_trust`` of all rows."""
    out = scratch(len(agreements), np.float32)
    for _, _, at in flat.spans():  # whole rows
        agreed, rows = agreements[at], flat.rows[at]
        credible, trust = agreed / (agreed + SUPPORT), np.ones_like(agreed)
        for back in range(1, TOKENS_BEFORE + 1):
            same = rows[back:] == rows[:-back]
            trust[back:][same] *= credible[:-back][same]
        out[at] = trust
    return out
