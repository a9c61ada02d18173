"""The rows on which contenders are measured, and those of them that the metric can judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.overlap import content_hash
from qtarget.evaluation.evaluate import RowSet, SetName
from qtarget.evaluation.judges import Judge, UnfitReference, make_judge
from qtarget.evaluation.questions import ask, has_answers, split


@dataclass(frozen=True)
class Metric:
    """How answers are judged, in words that travel to a worker.

    Attributes:
        name: see ``make_judge``; ``nll`` for the likelihood alone.
        asked: whether the user named it, so that rows without answers are an error.
    """

    name: str = "exact"
    pattern: str | None = None
    ignore_case: bool = False
    asked: bool = False

    def judge(self) -> Judge | None:
        """The judge, or None where likelihood is all.

        Raises:
            ConfigError: see ``make_judge``.
        """
        if self.name == "nll":
            return None
        return make_judge(self.name, pattern=self.pattern, ignore_case=self.ignore_case, more=("nll",))


def unseen(file: str, dataset: Any, trained: frozenset[bytes], text_field: str = "text") -> tuple[Any, Sequence[int]]:
    """The rows that are no training rows, and their numbers: what was learned by heart judges nobody.

    Args:
        trained: contents of the training rows.

    Raises:
        DataError: none is left.
    """
    hashes = [content_hash(row, text_field) for row in dataset]
    kept = [i for i, value in enumerate(hashes) if value not in trained]
    if hashes and not kept:
        raise DataError(
            f"{file}: all {len(hashes):,} rows are training rows too; a verdict needs rows that no contender saw"
        )
    return dataset if len(kept) == len(hashes) else dataset.select(kept), kept


def measured_set(
    name: SetName, file: str, dataset: Any, metric: Metric, numbers: Sequence[int] | None = None
) -> tuple[RowSet, list[int]]:
    """A set of the rows that the metric can judge, and the numbers of those rows.

    Args:
        numbers: of the rows in their file, from 0; default: their places in the data set.

    Raises:
        DataError: the metric was asked for, and the rows have no answers; or it can judge none of them.
    """
    judge, rows = metric.judge(), dataset.to_list()
    numbers = list(range(len(rows)) if numbers is None else numbers)
    if not rows:
        raise DataError(f"{file} holds no rows; expected rows with answers that no model is trained on")
    if judge is None or not (has_answers(rows) or metric.asked):
        return RowSet(name, file, dataset, None, None, numbers), numbers
    if not has_answers(rows):
        ask(rows, judge, file)  # which says what is missing
    kept = [i for i, row in enumerate(rows) if _fits(row, judge, f"{file}, row {numbers[i] + 1}")]
    if not kept:
        raise DataError(
            f"{file}: --metric {judge.name} can judge the answer of none of its {len(rows)} rows; choose another metric"
        )
    chosen = dataset.select(kept)
    found = [numbers[i] for i in kept]
    return RowSet(name, file, chosen, ask([rows[i] for i in kept], judge, file), judge, found), found


def _fits(row: Mapping[str, Any], judge: Judge, where: str) -> bool:
    _, answer = split(row, where)
    try:
        judge.fit(answer)
    except UnfitReference:
        return False
    return bool(answer.strip())


def row_texts(rows: RowSet, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Number in the file, prompt and reference of each row; of a row without answers its text, or its columns."""
    if rows.questions is not None:
        texts = [{"prompt": q.text, "reference": q.reference} for q in rows.questions]
    else:
        texts = [{"prompt": "", "reference": _text(row)} for row in rows.dataset.to_list()]
    return [{"row": number, **text} for number, text in zip(numbers, texts, strict=True)]


def _text(row: Mapping[str, Any]) -> str:
    text = row.get("text")
    return text if isinstance(text, str) else json.dumps(row, ensure_ascii=False, default=str)
