"""Where the base is confidently wrong against demonstrations that agree: a prior-based weight would amplify the flaw.

A target that trusts the base (a weight p or an anchor) pulls least towards labels that the base rules out. That is right
for noise, which does not repeat itself, and wrong for a correction, which does: several rows put the same other token
where the base is sure. So agreement tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from qtarget.command import command_for
from qtarget.data.checks.findings import ROWS_NAMED, Finding
from qtarget.report.audit.scored import Decode, ScoredTokens

CONFIDENCE = 0.9
"""Probability above which the base counts as sure."""
FEWEST_ROWS = 3
"""Different rows that must agree."""
AGREEMENT = 0.5
"""More than this share of the labels, wherever the base is sure of that token in that context, is the same other one."""
CONTEXTS = (None, 8, 4, 2, 0)
"""Tokens before the label that make "the same context"; None is the whole row up to it, 0 any place."""
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def flawed_prior(scored: ScoredTokens) -> list[dict[str, Any]]:
    """Groups of labels on which demonstrations agree against a sure base, largest first.

    A label counts once, in its most specific context; ``rows`` counts all that agree in it. Copies of a row count as one.

    Returns:
        Each ``labels`` (indices ``[n]`` into the columns of ``scored``), ``rows`` (different ones), ``context_tokens``,
        ``agreement``; empty without top-k.
    """
    if scored.top_ids is None or scored.top_log_probs is None:
        return []
    sure = np.flatnonzero(scored.top_log_probs > np.log(CONFIDENCE))
    copies = _row_hashes(scored)[scored.rows]
    open_, groups = np.ones(len(scored.places), dtype=bool), []
    for size, keys in _contexts(scored, sure):
        # the base's choice is part of the place: only labels at which it is sure of one token are compared
        keys = keys * HASH_FACTOR + scored.top_ids[sure].astype(np.uint64)
        for group in _groups(keys, sure, scored):
            rows = len(np.unique(copies[group["labels"]]))
            labels = group["labels"][open_[group["labels"]]]
            if rows >= FEWEST_ROWS and len(labels):
                open_[labels] = False
                groups.append(group | {"labels": labels, "rows": rows, "context_tokens": size})
    return sorted(groups, key=lambda group: -len(group["labels"]))


def _groups(keys: np.ndarray, sure: np.ndarray, scored: ScoredTokens) -> Iterator[dict[str, Any]]:
    """Of each context (equal keys) in which most labels are one token that is not the base's."""
    assert scored.top_ids is not None
    labels = scored.labels[sure]
    wrong = labels != scored.top_ids[sure]
    found, times = np.unique(keys[wrong], return_counts=True)
    repeated = found[times >= FEWEST_ROWS]
    if not len(repeated):
        return
    # most keys hold no repeated label: only those that do are sorted
    concerned = np.flatnonzero(repeated[np.searchsorted(repeated, keys).clip(max=len(repeated) - 1)] == keys)
    order = concerned[np.lexsort((labels[concerned], keys[concerned]))]
    key, label = keys[order], labels[order]
    new_key = np.concatenate([[True], key[1:] != key[:-1]])
    starts = np.flatnonzero(new_key | np.concatenate([[True], label[1:] != label[:-1]]))
    counts = np.diff(np.concatenate([starts, [len(order)]]))  # of one label in one context
    context = np.cumsum(new_key)[starts] - 1
    share = counts / np.bincount(context, counts)[context]
    for i in np.flatnonzero((counts >= FEWEST_ROWS) & (share > AGREEMENT) & wrong[order[starts]]):
        members = np.sort(order[starts[i] : starts[i] + counts[i]])
        yield {"labels": sure[members], "agreement": round(float(share[i]), 4)}


def _contexts(scored: ScoredTokens, sure: np.ndarray) -> Iterator[tuple[int | None, np.ndarray]]:
    """Context sizes and a hash ``[sure]`` of each label's context, the most specific first."""
    places = scored.places[sure]
    starts = scored.offsets[scored.rows[sure]]
    for size in CONTEXTS:
        if size is None:
            yield None, _prefix_hashes(scored)[places]
            continue
        keys = np.zeros(len(sure), dtype=np.uint64)
        for back in range(1, size + 1):
            inside = places - back >= starts
            token = np.where(inside, scored.ids[np.maximum(places - back, 0)] + 1, 0)  # 0 stands before the row
            keys = keys * HASH_FACTOR + token.astype(np.uint64)
        yield size, keys


def _prefix_hashes(scored: ScoredTokens) -> np.ndarray:
    """``[tokens + 1]``: entry t hashes the tokens of t's row before t (modulo 2**64, by position)."""
    total = len(scored.ids)
    row_of = np.repeat(np.arange(len(scored.numbers)), np.diff(scored.offsets))
    position = np.arange(total) - scored.offsets[row_of]
    longest = int(position.max(initial=0)) + 1
    powers = np.cumprod(np.full(longest, HASH_FACTOR, dtype=np.uint64))
    # plus 1, so that id 0 changes the hash; powers go by the place in the row, so equal beginnings have equal sums
    terms = (scored.ids + 1).astype(np.uint64) * powers[position]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    out = np.zeros(total + 1, dtype=np.uint64)
    out[:-1] = sums[:-1] - sums[scored.offsets[row_of]]
    return out


def _row_hashes(scored: ScoredTokens) -> np.ndarray:
    """``[rows]``: equal for rows of equal tokens."""
    last = scored.offsets[1:] - 1
    step = scored.ids[last].astype(np.uint64)
    return (_prefix_hashes(scored)[last] + step) * HASH_FACTOR + np.diff(scored.offsets).astype(np.uint64)


def agreed_labels(scored: ScoredTokens) -> np.ndarray:
    """``[labels]`` booleans: the label is in a group of ``flawed_prior``, so it repeats itself, which noise does not."""
    agreed = np.zeros(len(scored.places), dtype=bool)
    for group in flawed_prior(scored):
        agreed[group["labels"]] = True
    return agreed


def check_prior(scored: ScoredTokens, decode: Decode, *, known: bool = True) -> list[Finding]:
    """The finding ``flawed_prior``; ``flawed_prior_unchecked`` where the cache holds no top-k.

    Args:
        known: whether the base knows rows of this kind; else what they agree on is what it has to learn, and no fault of theirs.
    """
    if not len(scored.places):
        return []
    if scored.top_ids is None:
        message = (
            "whether demonstrations agree against a confident base cannot be told: the cache holds the labels' "
            f"log-probs alone; run `{command_for('score', '--top_k', '32', '--output', 'base_cache')}` and audit again with "
            "`--reference base_cache`"
        )
        return [Finding("flawed_prior_unchecked", "info", len(scored.numbers), (), message, {})]
    groups = flawed_prior(scored)
    if not groups:
        return []
    labels = np.concatenate([group["labels"] for group in groups])
    rows = np.unique(scored.rows[labels])
    examples = [_example(scored, group, decode) for group in groups[: 2 * ROWS_NAMED]]
    why = "is wrong there" if known else "does not know these rows (`row_kinds`), and has this to learn"
    message = (
        f"{len(labels)} labels in {len(rows)} rows, {len(groups)} contexts: the base puts more than {CONFIDENCE:.0%} on one token "
        f"where {FEWEST_ROWS} or more demonstrations agree on another: it {why}; a weight or anchor from this base would keep "
        f"that, plain sft corrects it{'; read the examples' if known else ''}"
    )
    evidence = {"labels": len(labels), "contexts": len(groups), "share": round(len(labels) / len(scored.places), 5)}
    named = tuple(int(scored.numbers[row]) for row in rows[:ROWS_NAMED])
    return [
        Finding(
            "flawed_prior", "warning" if known else "info", len(rows), named, message, evidence | {"examples": examples}
        )
    ]


def _example(scored: ScoredTokens, group: dict[str, Any], decode: Decode) -> dict[str, Any]:
    shown = scored.evidence(int(group["labels"][0]), decode)
    return shown | {
        "labels": len(group["labels"]),
        "rows_agreeing": group["rows"],
        "agreement": group["agreement"],
        "context_tokens": group["context_tokens"],
    }
