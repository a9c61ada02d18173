"""What the frozen base's numbers say about the rows of a training that is about to begin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from qtarget.integrations.sft.trainer import QTargetTrainer
from qtarget.report.audit.advice import Advice, facts_of, which_target
from qtarget.report.audit.compared import Compared
from qtarget.report.audit.noise import check_noise, knows_rows
from qtarget.report.audit.prior import check_prior
from qtarget.report.audit.scored import score_from_cache
from qtarget.scoring.cache.reader import ReferenceCache

ROWS = 5000
"""Rows that are looked at: the shares that advice rests on are then known to a point."""


def advice_for(trainer: QTargetTrainer, cache: ReferenceCache, compared: Compared | None = None) -> Advice | None:
    """``qtarget audit-data``'s advice, from rows that are tokenised already; None where the cache holds none of them.

    Args:
        cache: of the base.
        compared: a finished comparison of these rows and this model.
    """
    rows = list(islice(_rows(trainer.train_dataset), ROWS))
    scored, _ = score_from_cache(rows, cache)
    if not len(scored.places):
        return None
    tokenizer: Any = trainer.processing_class
    noise = check_noise(scored, tokenizer.decode)
    findings = [*noise, *check_prior(scored, tokenizer.decode, known=knows_rows(noise))]
    needs_teacher = bool(trainer.target.needs.teacher)
    validation = trainer.eval_dataset is not None
    facts = facts_of(findings, rows=len(rows), teacher=needs_teacher, validation=validation)
    return which_target(facts, compared)


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows one by one, also out of packed ones."""
    columns = ["input_ids", "labels", "seq_lengths"]
    for row in dataset.select_columns([name for name in columns if name in dataset.column_names]):
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            yield {key: row[key][start : start + length] for key in ("input_ids", "labels")}
            start += length
