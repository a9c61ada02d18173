"""What copies say that have not seen the rows (`qtarget score --crossfit`): one more witness beside the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qtarget.core.errors import CacheMismatchError
from qtarget.data.checks.findings import Finding
from qtarget.data.crossfit.witness import verdict
from qtarget.filtering.copies import require_witness
from qtarget.filtering.lookup import rows_in_cache
from qtarget.report.audit.noise import row_kinds
from qtarget.report.audit.scored import ScoredTokens
from qtarget.scoring.cache.reader import ReferenceCache

RULE, MISMATCH = "crossfit", "witness_mismatch"


def check_witness(
    scored: ScoredTokens,
    trained: Sequence[Mapping[str, Any]],
    cache: ReferenceCache,
    witness: ReferenceCache,
    sided: bool = True,
    weights: np.ndarray | None = None,
) -> list[Finding]:
    """How much of the rows the copies find to be noise, and whether they tell two kinds; or that they do not know the rows;
    or why it is no witness: then training stops, too.

    Args:
        scored: what the base says.
        trained: all rows as they are trained; ``scored.numbers`` names those that the base has judged.
        witness: of the copies.
        sided: whether to read what lies beside the witness, which a signature does not cover.
        weights: as for ``row_kinds``.
    """
    try:
        require_witness(witness, cache)
    except CacheMismatchError as error:
        return [Finding(MISMATCH, "error", len(trained), (), str(error))]
    if not len(scored.places):
        return []
    masks = np.zeros(len(scored.ids), dtype=bool)
    masks[scored.places] = True
    cuts = scored.offsets[1:-1]
    ids, trained_at = np.split(scored.ids, cuts), np.split(masks, cuts)
    try:
        rows = rows_in_cache(cache, ids, trained_at, scored.numbers, witness=witness, sided=sided)
    except CacheMismatchError as error:
        return [Finding(MISMATCH, "error", len(trained), (), f"witness: {error}")]
    assert rows.crossfit is not None, "a witness was given"
    told = rows.knowledge.facts()
    if not rows.knowledge.known:  # a share of noise would be a fact about the copies
        message = f"{rows.knowledge.sentence}, so nobody can tell noise by them; {rows.way_out}"
        return [Finding("crossfit_unknown", "warning", len(rows), (), message, told)]
    found = verdict(rows.log_probs, rows.crossfit, rows.row_of_trained)
    message = f"{rows.knowledge.sentence}; {found.words()}"
    return [
        Finding("crossfit_noise", "info", len(rows), (), message, dict(vars(found)) | {"copies": told}),
        row_kinds("crossfit_kinds", rows, RULE, weights=weights),
    ]
