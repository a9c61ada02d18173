"""Known noise: marks on rows and on tokens, and how well each score finds them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from qtarget.core.errors import ConfigError, DataError
from qtarget.data.noise import noise_token_mask, response_text
from qtarget.data.roc import roc_auc

UNPLACED = 2
"""Mark of a token whose row has spans that could not be found in it: neither noise nor clean."""
CURVE_POINTS = 101
RESAMPLES = 200


def parse_mark(text: str) -> tuple[str, str]:
    """``COLUMN=VALUE`` apart; ``COLUMN`` alone means true.

    Example:
        >>> parse_mark("is_correct=false"), parse_mark("noisy")
        (('is_correct', 'false'), ('noisy', 'true'))
    """
    column, _, value = text.partition("=")
    return column, value or "true"


def row_marks(rows: Sequence[Mapping[str, Any]], mark: str | None) -> np.ndarray | None:
    """``[rows]`` which rows are marked: by ``COLUMN=VALUE``, or else by ``noise_spans``; None without marks.

    Raises:
        ConfigError: no row has the column.
    """
    if mark is not None:
        column, value = parse_mark(mark)
        if not any(row.get(column) is not None for row in rows):
            raise ConfigError(f"--mark {mark}: no row has a value in column {column!r}; columns: {', '.join(rows[0])}")
        return np.array([str(row.get(column)).lower() == value.lower() for row in rows])
    if not any(noise_spans(row) is not None for row in rows):
        return None
    return np.array([bool(noise_spans(row)) for row in rows])


def noise_spans(row: Mapping[str, Any]) -> list[Any] | None:
    """The spans of a row as ``qtarget noise`` writes them; text where Arrow could not hold them."""
    spans = row.get("noise_spans")
    return json.loads(spans) if isinstance(spans, str) else spans


def token_marks(row: Mapping[str, Any], ids: np.ndarray, places: np.ndarray, tokenizer: Any) -> np.ndarray | None:
    """Which trained tokens overlap a noise span, or None where the response cannot be found in them.

    Args:
        ids: ``[tokens]`` of the whole row.
        places: ``[trained]`` where its trained tokens are, ascending.

    Returns:
        ``[trained]`` booleans.
    """
    spans = noise_spans(row)
    if not spans or not len(places):
        return np.zeros(len(places), dtype=bool)
    try:
        response = response_text(dict(row))
    except DataError:
        return None
    direct = offsets_in_response(row, response, ids, tokenizer)
    offsets = [direct[i] for i in places] if direct is not None else _decoded_offsets(response, ids, places, tokenizer)
    return None if offsets is None else np.array(noise_token_mask(offsets, spans), dtype=bool)


def offsets_in_response(
    row: Mapping[str, Any], response: str, ids: np.ndarray, tokenizer: Any
) -> list[tuple[int, int]] | None:
    """Place of each token in the response, where the row is prompt and response tokenised at once; (0, 0) before it.

    Decoding would not find a response with letters that the tokenizer does not know.
    """
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not getattr(tokenizer, "is_fast", False):
        return None
    encoded = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    for lead in (0, 1):  # 1: behind a begin mark
        count = min(len(encoded["input_ids"]), len(ids) - lead)  # an end mark may follow; max_length may have cut
        if count > 0 and ids[lead : lead + count].tolist() == encoded["input_ids"][:count]:
            pairs = [(max(a - len(prompt), 0), max(b - len(prompt), 0)) for a, b in encoded["offset_mapping"][:count]]
            return [(0, 0)] * lead + pairs + [(len(response), len(response))] * (len(ids) - lead - count)
    return None


def _decoded_offsets(
    response: str, ids: np.ndarray, places: np.ndarray, tokenizer: Any
) -> list[tuple[int, int]] | None:
    """Place of each trained token in the response, by the text of the trained tokens.

    Nothing predicts the first token of a row: where labels begin at the second, it may be the response's first as well.
    """
    for before in [ids[:1], ids[:0]] if places[0] == 1 else [ids[:0]]:
        tokens = np.concatenate([before, ids[places]])
        whole = decode(tokenizer, tokens)
        start = whole.find(response)
        if start >= 0 or response.startswith(whole):  # startswith: cut at max_length
            offsets = [(a - max(start, 0), b - max(start, 0)) for a, b in token_offsets(tokenizer, tokens, whole)]
            return offsets[len(before) :]
    return None


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    """Text of some tokens, as it is."""
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def token_offsets(tokenizer: Any, ids: np.ndarray, whole: str) -> list[tuple[int, int]]:
    """``(start, end)`` of each token in the decoded text: the tokenizer's own where it agrees, else by prefixes."""
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if encoded["input_ids"] == ids.tolist():
            return [tuple(pair) for pair in encoded["offset_mapping"]]
    ends = [0, *(len(decode(tokenizer, ids[: i + 1])) for i in range(len(ids)))]
    return list(pairwise(ends))


def roc(scores: np.ndarray, marked: np.ndarray) -> dict[str, Any]:
    """Curve and area of "a higher score means a mark"; ties count half.

    Returns:
        ``auc`` (0.5 is chance; None where all or none are marked) and ``curve``, at most 101 points of
        ``[false positive rate, true positive rate]``.

    Example:
        >>> roc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False]))["auc"]
        1.0
    """
    positives, negatives = int(marked.sum()), int((~marked).sum())
    if not positives or not negatives:
        return {"auc": None, "curve": []}
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.concatenate([ordered[1:] != ordered[:-1], [True]])  # a tie is one step of the curve
    hits, misses = np.cumsum(marked[order])[last], np.cumsum(~marked[order])[last]
    tpr, fpr = np.concatenate([[0], hits]) / positives, np.concatenate([[0], misses]) / negatives
    grid = np.unique(np.linspace(0, len(tpr) - 1, CURVE_POINTS).round().astype(int))
    return {"auc": roc_auc(scores, marked), "curve": np.stack([fpr[grid], tpr[grid]], -1).round(4).tolist()}


def interval(scores: np.ndarray, marked: np.ndarray, seed: int = 0) -> list[float] | None:
    """95 % of 200 bootstrap resamples of the rows; None where a resample could have no marks."""
    if min(marked.sum(), (~marked).sum()) < 10:
        return None
    rng = np.random.default_rng(seed)
    samples = rng.integers(0, len(scores), (RESAMPLES, len(scores)))
    found = [roc_auc(scores[i], marked[i]) for i in samples]
    return [float(v) for v in np.percentile([v for v in found if v is not None], [2.5, 97.5])]


def scored(names_and_scores: Mapping[str, np.ndarray], marked: np.ndarray, *, rows: bool) -> list[dict[str, Any]]:
    """The ROC of every score against the marks; with an interval where each score is of one row."""
    out = []
    for name, scores in names_and_scores.items():
        found = {"score": name, **roc(scores.astype(np.float64), marked)}
        if rows:
            found["interval"] = interval(scores.astype(np.float64), marked)
        out.append(found)
    return out


def check_marks(mark: str | None, marks: np.ndarray | None) -> None:
    """Raise where marks were asked for and none or all rows carry one.

    Raises:
        ConfigError: the value matches no row, or every row.
    """
    if mark is not None and marks is not None and marks.sum() in (0, len(marks)):
        raise ConfigError(f"--mark {mark} matches {int(marks.sum())} of {len(marks)} rows; check the value")
