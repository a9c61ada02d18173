"""Is the server what it is taken for? One known text, tokenised and scored on both sides, before any row is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.rows import Source
from qtarget.scoring.sources.http import HttpSource

CANARY = (
    "In 1815, M. Charles-François Myriel was Bishop of Digne. def f(x): return x ** 2 + 3 * x - 17  "
    "Die Straße ist naß; 今日は晴れです。 What is 12.5% of 480? Answer: 60."
)
"""Words, code, numbers, accents, another script: tokenizers that differ rarely agree on all of it."""

CANARY_TOKENS = 64
TOLERANCE = 0.05
"""Nats, mean over the canary's tokens. bfloat16 against float32 moves a log-prob by some 1e-3 to 1e-2 (up to 8e-3 measured
on a 135M-parameter model), quantised kernels somewhat more; other weights, even of the same family, by several tenths."""


@dataclass(frozen=True)
class CanaryReport:
    """How far the two sides are apart, in nats.

    Attributes:
        tokens: compared.
        mean, largest: absolute difference of the tokens' own log-probs.
    """

    tokens: int
    mean: float
    largest: float


def check_tokenizer(source: HttpSource, tokenizer: Any) -> list[int]:
    """Make sure that the server's tokenizer reads the canary as ours does; the ids are returned.

    Raises:
        ScoringServerError: it does not; names the first difference.
    """
    ours, theirs = list(tokenizer(CANARY)["input_ids"]), source.tokenize(CANARY)
    if ours == theirs:
        return ours
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    found, expected = (
        f"{ids[place]} ({tokenizer.convert_ids_to_tokens([ids[place]])[0]!r} here)" if place < len(ids) else "no token"
        for ids in (theirs, ours)
    )
    raise ScoringServerError(
        f"the {source.engine} server has another tokenizer: its token {place} of the canary text is {found}, expected "
        f"{expected}; serve a model with the tokenizer of the model that is trained"
    )


def check_model(source: HttpSource, ids: list[int], local: Source, name: str, *, tolerance: float) -> CanaryReport:
    """Make sure that the server gives the canary the log-probs that a model gives it here.

    Args:
        ids: of the canary.
        local: scores with the model that the server is said to serve, or its like in another dtype; with its logit scale
            and soft-cap, which the server applies as the model's config says.
        name: of that model, for the message.
        tolerance: nats, of the mean absolute difference.

    Raises:
        ScoringServerError: it does not.
    """
    row = np.array(ids[:CANARY_TOKENS])
    (there,), (here,) = source.score([row], 1), local.score([row], 1)
    apart = np.abs(there.label_log_probs.astype(np.float64) - here.label_log_probs)
    report = CanaryReport(len(apart), float(apart.mean()), float(apart.max()))
    if not report.mean <= tolerance:
        raise ScoringServerError(
            f"the {source.engine} server is not {name}: on a canary text of {report.tokens} tokens its log-probs differ by "
            f"{report.mean:.3g} nats on average (largest {report.largest:.3g}), expected at most {tolerance}; serve {name}, or "
            "name the model that is served"
        )
    return report
