"""Where a target's weight and gradient go: by probability, by position, by group. Exact numbers, nothing quantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qtarget.report.inspect.weights import TargetNumbers
from qtarget.report.tokens import ModelNumbers, TokenRows

BINS = 20
GROUPS_SHOWN = 20


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``, or None where there is nothing to divide by."""
    return float(part / whole) if whole else None


def distribution(
    rows: TokenRows, live: ModelNumbers, targets: Sequence[TargetNumbers], groups: Sequence[str] | None = None
) -> dict[str, Any]:
    """All distributions of one model's numbers.

    Args:
        rows: the tokens.
        live: the model.
        targets: at the same tokens.
        groups: a name for each row, such as its source.

    Returns:
        ``summary`` (per target: effective sample size, share of the loss kept), ``histogram`` of ``p(label)`` in 20 equal
        bins, ``deciles`` (tokens in ten parts of equal number by ``p(label)``, least likely first), ``positions`` and
        ``groups``; shares are of one.
    """
    log_probs = live.label_log_probs.astype(np.float64)
    probs = np.exp(log_probs)
    order = np.argsort(log_probs, kind="stable")
    decile = np.empty(len(order), dtype=np.int64)
    decile[order] = np.arange(len(order)) * 10 // max(1, len(order))
    edges = np.linspace(0, 1, BINS + 1)
    place = rows.place_of_trained
    position = np.frexp(place + 1)[1] - 1  # 0, 1-2, 3-6, 7-14, ...: bins that double
    names = [_span(2**i - 1, 2 ** (i + 1) - 2) for i in range(int(position.max(initial=0)) + 1)]
    out: dict[str, Any] = {
        "tokens": len(probs),
        "nll_mean": ratio(-log_probs.sum(), len(log_probs)),
        "entropy_mean": ratio(live.entropy.sum(dtype=np.float64), len(probs)),
        "summary": [summary(target, log_probs) for target in targets],
        "histogram": {
            "edges": edges.round(6).tolist(),
            "counts": np.histogram(probs.clip(0, 1), edges)[0].tolist(),
        },
        "deciles": parts(decile, [str(i + 1) for i in range(10)], log_probs, live.entropy, targets),
        "positions": parts(position, names, log_probs, live.entropy, targets),
    }
    if groups is not None:
        values, counts = np.unique(np.array(groups, dtype=object).astype(str), return_counts=True)
        kept = sorted(values[np.argsort(-counts, kind="stable")][:GROUPS_SHOWN].tolist())
        index = {name: i for i, name in enumerate(kept)}
        of_row = np.array([index.get(str(group), len(kept)) for group in groups])
        labels = kept if len(kept) == len(values) else [*kept, f"{len(values) - len(kept)} others"]
        out["groups"] = parts(of_row[rows.row_of_trained], labels, log_probs, live.entropy, targets)
    return out


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def summary(target: TargetNumbers, log_probs: np.ndarray) -> dict[str, Any]:
    """One target over all tokens.

    ``effective_sample_share`` is Kish's ``(sum a)^2 / (n sum a^2)``: the share of tokens that, equally weighted, would
    average as well. ``loss_kept`` is ``sum a nll / sum nll``.
    """
    a = target.label_weights.astype(np.float64)
    return {
        "target": target.name,
        "label_weight_mean": ratio(a.sum(), len(a)),
        "residual_weight_mean": ratio(target.residual_weights.sum(dtype=np.float64), len(a)),
        "moved_mean": ratio(target.moved.sum(dtype=np.float64), len(a)),
        "effective_sample_share": ratio(a.sum() ** 2, len(a) * (a**2).sum()),
        "loss_kept": ratio((a * -log_probs).sum(), -log_probs.sum()),
    }


def parts(
    index: np.ndarray,
    names: Sequence[str],
    log_probs: np.ndarray,
    entropy: np.ndarray,
    targets: Sequence[TargetNumbers],
) -> dict[str, Any]:
    """Tokens by part: their number, mean nll and entropy, and each target's share of weight and of gradient."""

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(index, values.astype(np.float64), len(names))

    counts = np.bincount(index, minlength=len(names))

    def mean(values: np.ndarray) -> list[float | None]:
        return [ratio(v, n) for v, n in zip(total(values), counts, strict=True)]

    def share(values: np.ndarray) -> list[float | None]:
        sums = total(values)
        return [ratio(v, sums.sum()) for v in sums]

    return {
        "names": list(names),
        "counts": counts.tolist(),
        "p_low": [float(np.exp(log_probs[index == i].min())) if n else None for i, n in enumerate(counts)],
        "p_high": [float(np.exp(log_probs[index == i].max())) if n else None for i, n in enumerate(counts)],
        "nll": mean(-log_probs),
        "entropy": mean(entropy),
        "targets": [
            {
                "target": t.name,
                "weight_share": share(t.label_weights),
                "gradient_share": share(t.moved),
                "weight_mean": mean(t.label_weights),
            }
            for t in targets
        ],
    }
