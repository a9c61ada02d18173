"""What a copy says of each answer under the prompts of other rows that it has not seen either."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.data.crossfit.neighbours import contradiction, nearest_prompts
from qtarget.scoring.cache.progress import TokenMeter
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask
from qtarget.scoring.contradictions import write_side
from qtarget.scoring.sources.distributed import Processes
from qtarget.scoring.sources.local import LocalSource

AT_ONCE = 512
"""Rows that are in memory together."""


Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A row's prompt, all that follows, and which of that is trained."""


@dataclass(frozen=True)
class Question:
    """The rows of one fold; travels between processes.

    Attributes:
        parts: see ``cut``.
        own: ``[rows]`` log-prob of each answer under its own prompt.
        longest: tokens of the longest row of all.
        seed: of the prompts among which neighbours are looked for.
    """

    fold: int
    parts: list[Part]
    own: np.ndarray
    longest: int
    seed: int


def write_contradictions(
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    by_checksum: Mapping[str, int],
    judge: Callable[[int], LocalSource],
    seed: int,
    meter: TokenMeter,
    processes: Processes | None = None,
) -> None:
    """Ask each copy once more, and leave a number a row beside the finished cache.

    Args:
        rows: ``input_ids`` and ``labels`` of all rows; one row twice counts once.
        by_checksum: the fold of each distinct row.
        judge: gives the source of a fold.
        seed: of the prompts among which neighbours are looked for.
        processes: ask the copies side by side there; absent: one after the other, in this process.
    """
    cache, distinct = ReferenceCache.open(directory, verify=False), distinct_rows(rows)
    folds = sorted({by_checksum[name] for name in distinct})
    names = [[name for name in distinct if by_checksum[name] == fold] for fold in folds]
    longest = max(len(ids) for ids, _ in distinct.values())

    def question(number: int) -> Question:
        own = [float(cache.row(place)["label_log_probs"].sum()) for place in cache.locate(names[number])]
        parts = [cut(*distinct[name]) for name in names[number]]
        return Question(folds[number], parts, np.array(own), longest, seed)

    told: dict[int, np.ndarray] = {}
    meter.start(len(distinct))
    if processes is None:
        for number in range(len(folds)):
            told[number] = answered(question(number), judge, meter.advance)
    else:
        with closing(processes.run(answered, len(folds), lambda n: (question(n), judge))) as calls:
            for number, values in calls:
                told[number] = values
                meter.advance(len(values))
    checksums = [name for number in told for name in names[number]]
    write_side(directory, checksums, np.concatenate(list(told.values())))


def distinct_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens and mask of each row that is trained on, by its checksum."""
    distinct: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for row in rows:
        mask = np.asarray(supervised_mask(row["labels"]), dtype=bool)
        if mask.any():
            distinct.setdefault(row_checksum(row["input_ids"], mask), (np.asarray(row["input_ids"]), mask))  # pyright: ignore[reportArgumentType]
    return distinct


def answered(
    question: Question, judge: Callable[[int], LocalSource], advance: Callable[[int], None] = lambda _: None
) -> np.ndarray:
    """By how much the best other prompt makes each answer of a fold likelier; the copy is let go after.

    Args:
        advance: told of so many rows more.
    """
    near = nearest_prompts([prompt for prompt, _, _ in question.parts], question.seed)
    source, told = judge(question.fold), [np.empty(0)]
    for start in range(0, len(question.parts), AT_ONCE):
        some = range(start, min(start + AT_ONCE, len(question.parts)))
        elsewhere = asked_elsewhere(source, question.parts, near, some, question.longest)
        told.append(contradiction(question.own[some.start : some.stop], elsewhere))
        advance(len(some))
    return np.concatenate(told)


def cut(ids: np.ndarray, trained: np.ndarray) -> Part:
    """A row at its first trained token; a start token alone is no prompt.

    Example:
        >>> [part.tolist() for part in cut(np.array([1, 2, 3, 4]), np.array([False, False, True, True]))]
        [[1, 2], [3, 4], [True, True]]
    """
    first = int(np.argmax(trained))
    return ids[:first] if first > 1 else ids[:0], ids[first:], trained[first:]


def asked_elsewhere(
    source: LocalSource, parts: Sequence[Part], near: np.ndarray, some: range, longest: int
) -> np.ndarray:
    """``[rows, prompts]`` log-prob of each answer under other prompts; -inf without one, or where a row would be too long."""
    out = np.full((len(some), near.shape[1]), -np.inf)
    asked = [
        (i - some.start, column)
        for i in some
        for column in range(near.shape[1])
        if len(parts[i][0]) and near[i, column] >= 0
        if 0 < len(parts[near[i, column]][0]) <= longest - len(parts[i][1])
    ]
    if not asked:
        return out
    prompts = [parts[near[some[i], column]][0] for i, column in asked]
    ids = [np.concatenate([prompt, parts[some[i]][1]]) for (i, _), prompt in zip(asked, prompts, strict=True)]
    places = [len(prompt) + np.flatnonzero(parts[some[i]][2]) for (i, _), prompt in zip(asked, prompts, strict=True)]
    for (i, column), row in zip(asked, source.score(ids, 0, positions=places), strict=True):
        out[i, column] = float(row.label_log_probs.sum())
    return out
