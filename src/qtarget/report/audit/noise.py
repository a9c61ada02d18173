"""Suspected label noise: tokens and rows at which the base is more surprised than it usually is on this data.

Surprise alone marks every place where much can be said. The excess, surprise minus entropy, marks those where the base
expected something else. How well either finds real noise is measured in ``docs/audit.md``; on answers that are wrong but
fluent, hardly at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qtarget.command import command_for
from qtarget.data.checks.findings import ROWS_NAMED, Finding, named
from qtarget.filtering import ScoredRows, decide
from qtarget.filtering.decision import UNEXPECTED
from qtarget.report.audit.scored import Decode, ScoredTokens

DEVIATIONS = 4.0
"""Robust standard deviations above the median from which an excess is an outlier (Leys et al. 2013 suggest 2 to 3)."""
LEAST_EXCESS = 3.0
"""Nats: an outlier token is also 20 times less likely than the base's own text is there."""
LEAST_ROW_SURPRISE = 0.5
"""Nats a token: an outlier row also stands this far above the median row, however alike the others are."""
MAD_TO_DEVIATION = 1.4826
"""Of a normal distribution."""
FEWEST_ROWS = 20
"""Below this, "usual on this data" means nothing for rows."""
UNKNOWN = "the base does not know these rows (`row_kinds`), so this tells what it has to learn, and no noise"


def token_threshold(scored: ScoredTokens) -> float:
    """The excess, in nats, above which a token is suspected."""
    # where nearly all excesses are alike the robust deviation is near 0 and would suspect half of them
    return max(LEAST_EXCESS, _outliers_from(scored.excess)) if len(scored.places) else LEAST_EXCESS


def suspected_tokens(scored: ScoredTokens) -> np.ndarray:
    """``[labels]`` booleans: the base expected something else there, more than it usually does on this data."""
    return scored.excess > token_threshold(scored)


def row_means(scored: ScoredTokens, values: np.ndarray) -> np.ndarray:
    """``[rows]`` mean of ``values [labels]`` over each row's trained tokens."""
    count = np.bincount(scored.rows, minlength=len(scored.numbers))
    return np.bincount(scored.rows, values, minlength=len(scored.numbers)) / np.maximum(count, 1)


def suspected_rows(scored: ScoredTokens) -> np.ndarray:
    """``[rows]`` booleans: mean surprise is an outlier among the rows."""
    means = row_means(scored, -scored.log_probs.astype(np.float64))
    return means > row_threshold(means) if len(means) >= FEWEST_ROWS else np.zeros(len(means), dtype=bool)


def row_threshold(means: np.ndarray) -> float:
    """The mean surprise, in nats a token, above which a row is suspected; ``means [rows]``."""
    return max(_outliers_from(means), float(np.median(means)) + LEAST_ROW_SURPRISE)


WEIGHED = 0.5
"""Of the mean weight of the other rows: under this the bad rows were weighed down before, on the mean."""


def check_noise(scored: ScoredTokens, decode: Decode, weights: np.ndarray | None = None) -> list[Finding]:
    """How surprised the base is, and where it is surprised beyond that.

    Args:
        weights: as for ``row_kinds``.
    """
    if not len(scored.places):
        return []
    kinds = row_kinds("row_kinds", scored_rows(scored), weights=weights)
    known = knows_rows([kinds])
    return [_surprise(scored), kinds, *_tokens(scored, decode, known), *_rows(scored, decode, known)]


def knows_rows(findings: Sequence[Finding]) -> bool:
    """Whether the base knows rows of this kind, as far as ``row_kinds`` could judge that."""
    return all(found.evidence.get("kept_excess", 0.0) <= UNEXPECTED for found in findings if found.check == "row_kinds")


def _surprise(scored: ScoredTokens) -> Finding:
    surprise = -scored.log_probs.astype(np.float64)
    evidence = {
        "labels": len(surprise),
        "mean_surprise": round(float(surprise.mean()), 4),
        "median_surprise": round(float(np.median(surprise)), 4),
        "mean_entropy": round(float(scored.entropy.astype(np.float64).mean()), 4),
        "favourite_share": None if scored.ranks is None else round(float((scored.ranks == 1).mean()), 4),
    }
    favourite = "" if scored.ranks is None else f"; {evidence['favourite_share']:.0%} of labels are its first choice"
    message = (
        f"the base's surprise at the labels is {evidence['mean_surprise']:.2f} nats a token (median "
        f"{evidence['median_surprise']:.2f}), its entropy there {evidence['mean_entropy']:.2f}{favourite}"
    )
    return Finding("base_surprise", "info", len(scored.numbers), (), message, evidence)


def row_kinds(check: str, rows: ScoredRows, rule: str = "auto", *, weights: np.ndarray | None = None) -> Finding:
    """Whether a rule of the filter tells good rows from bad ones at all, and whether the rows' weights do so already.

    Args:
        weights: ``[rows of the data]`` the weight of each; None where no row has one.
    """
    decision = decide(rows, rule)
    bad = rows.numbers[~decision.keep]
    found = {"verdict": decision.verdict, "bad_rows": len(bad), "threshold": decision.threshold, **decision.facts}
    if not len(bad):
        return Finding(check, "info", 0, (), decision.summary, found)
    first = tuple(int(row) for row in bad[:ROWS_NAMED])
    kept = 1.0 if weights is None else float(weights[rows.numbers[decision.keep]].mean())
    if weights is not None and weights[bad].mean() < WEIGHED * kept:
        message = (
            f"{decision.summary}: {named(bad.tolist())}; their weights are {weights[bad].mean():.2f} on average, those of the "
            f"other rows {kept:.2f}, so they are weighed already"
        )
        return Finding(check, "info", 0, first, message, found | {"weighed": True})
    shown = command_for("filter", *(("--rule", rule) if rule != "auto" else ()))
    message = f"{decision.summary}: {named(bad.tolist())}; `{shown}` shows them, `filter: {rule}` leaves them out"
    return Finding(check, "warning", len(bad), first, message, found)


def scored_rows(scored: ScoredTokens) -> ScoredRows:
    """The same rows as the filter takes them."""
    trained = np.zeros(len(scored.ids), dtype=bool)
    trained[scored.places] = True
    return ScoredRows(
        scored.numbers, scored.ids, scored.offsets, trained,
        scored.log_probs.astype(np.float64), scored.entropy.astype(np.float64),
    )  # fmt: skip


def _tokens(scored: ScoredTokens, decode: Decode, known: bool) -> list[Finding]:
    suspected, rows_of = suspected_tokens(scored), scored.rows
    rows, worst = np.unique(rows_of[suspected]), np.flatnonzero(suspected)
    if not len(worst):
        return []
    worst = worst[np.argsort(-scored.excess[worst], kind="stable")][: 2 * ROWS_NAMED]
    found_spans = spans(suspected, rows_of)
    threshold, share = token_threshold(scored), float(suspected.mean())
    message = (
        f"{suspected.sum()} of {len(suspected)} labels ({share:.1%}, in {len(rows)} of {len(scored.numbers)} rows, "
        f"{len(found_spans)} spans) surprise the base by {threshold:.1f} nats more than it expected there; "
        + ("read the examples: noise, or something that the base has to learn" if known else UNKNOWN)
    )
    evidence = {
        "labels": int(suspected.sum()),
        "share": round(share, 4),
        "spans": len(found_spans),
        "threshold": round(threshold, 4),
        "examples": [scored.evidence(int(i), decode) for i in worst],
        "longest_spans": [
            _span(scored, *s, decode) for s in sorted(found_spans, key=lambda s: s[0] - s[1])[:ROWS_NAMED]
        ],
    }
    return [
        Finding("surprising_tokens", "warning" if known else "info", len(rows), _named(scored, rows), message, evidence)
    ]


def spans(suspected: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Runs ``[start, stop)`` of suspected labels in one row; a single unsuspected label does not end a run.

    Example:
        >>> spans(np.array([1, 1, 0, 1, 0, 0, 1, 1], bool), np.array([0, 0, 0, 0, 0, 0, 0, 1]))
        [(0, 4), (6, 7), (7, 8)]
    """
    at = np.flatnonzero(suspected)
    if not len(at):
        return []
    breaks = np.flatnonzero((np.diff(at) > 2) | (np.diff(rows[at]) != 0))
    starts, stops = at[np.concatenate([[0], breaks + 1])], at[np.concatenate([breaks, [len(at) - 1]])] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _span(scored: ScoredTokens, start: int, stop: int, decode: Decode) -> dict[str, Any]:
    row = int(scored.rows[start])
    first, last = (int(scored.places[i] - scored.offsets[row]) for i in (start, stop - 1))
    return {
        "row": int(scored.numbers[row]),
        "position": first,
        "end": last + 1,
        "text": decode(scored.labels[start:stop].tolist()),
        "log_prob": round(float(scored.log_probs[start:stop].sum(dtype=np.float64)), 4),
    }


def _rows(scored: ScoredTokens, decode: Decode, known: bool) -> list[Finding]:
    rows = np.flatnonzero(suspected_rows(scored))
    if not len(rows):
        return []
    surprise = -scored.log_probs.astype(np.float64)
    means = row_means(scored, surprise)
    rows = rows[np.argsort(-means[rows], kind="stable")]
    examples = []
    for row in rows[:ROWS_NAMED]:
        labels = np.flatnonzero(scored.rows == row)
        worst = int(labels[np.argmax(surprise[labels])])
        examples.append(
            {"mean_surprise": round(float(means[row]), 4), "labels": len(labels)} | scored.evidence(worst, decode)
        )
    message = (
        f"{len(rows)} of {len(means)} rows surprise the base by {row_threshold(means):.2f} nats a token or more, where "
        f"half of the rows do by {np.median(means):.2f} or less: {named(_named(scored, rows), len(rows))}; "
        + ("read them: wrong answers, another language or format, or just short rows" if known else UNKNOWN)
    )
    evidence = {"threshold": round(row_threshold(means), 4), "examples": examples}
    return [
        Finding("surprising_rows", "warning" if known else "info", len(rows), _named(scored, rows), message, evidence)
    ]


def _named(scored: ScoredTokens, rows: np.ndarray) -> tuple[int, ...]:
    return tuple(int(scored.numbers[row]) for row in rows[:ROWS_NAMED])


def _outliers_from(values: np.ndarray) -> float:
    """Median plus ``DEVIATIONS`` robust standard deviations."""
    median = float(np.median(values))
    return median + DEVIATIONS * MAD_TO_DEVIATION * float(np.median(np.abs(values - median)))
