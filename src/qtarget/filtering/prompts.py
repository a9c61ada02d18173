"""A task that the base does not know is told by its prompts; noise is not."""

from __future__ import annotations

import numpy as np

from qtarget.data.roc import roc_auc
from qtarget.filtering.evidence import ScoredRows

FOLDS = 5


def told_by_prompt(rows: ScoredRows, suspected: np.ndarray, seed: int = 0) -> float:
    """How well the prompts alone tell the suspected rows: ROC-AUC of naive Bayes over their tokens, on rows held out.

    Args:
        rows: their tokens before the first trained one are the prompt.
        suspected: ``[rows]`` booleans.
        seed: of the folds.

    Returns:
        0.5 where prompts say nothing, or where there are fewer than five rows of either kind; 1 where they say it all.
    """
    if min(suspected.sum(), (~suspected).sum()) < FOLDS:
        return 0.5
    row, token, vocabulary = _prompt_tokens(rows)
    folds = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    scores = np.zeros(len(rows))
    for fold in range(FOLDS):
        learned = folds != fold
        rates = [
            (np.bincount(token[(learned & kind)[row]], minlength=vocabulary) + 1) / ((learned & kind).sum() + 2)
            for kind in (suspected, ~suspected)
        ]
        found = np.bincount(row, np.log(rates[0] / rates[1])[token], minlength=len(rows))
        scores[~learned] = found[~learned]
    found = roc_auc(scores, suspected)
    assert found is not None, "there are rows of both kinds"
    return found


def _prompt_tokens(rows: ScoredRows) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and token of every distinct pair of the two in the prompts, and how many tokens there are."""
    row = np.repeat(np.arange(len(rows)), np.diff(rows.offsets))
    first = np.flatnonzero(rows.trained)[rows.bounds[:-1]]
    before = np.arange(len(rows.ids)) < first[row]
    tokens, places = np.unique(rows.ids[before], return_inverse=True)
    size = max(len(tokens), 1)
    pairs = np.unique(row[before] * size + places)
    return pairs // size, pairs % size, size
