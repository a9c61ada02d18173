"""What the base thinks of an answer without its prompt: one more scoring pass, over answers alone, kept in a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum, supervised_mask
from qtarget.scoring.sources.local import score_rows

Row = dict[str, np.ndarray]


def without_prompt(ids: np.ndarray, trained: np.ndarray) -> Row:
    """A row's trained tokens and, of the others, the one before each stretch of them.

    That one stays because a first token can be predicted from something only: the end of a template's header, or of a
    prompt, which tells the place and hardly the question.

    Example:
        >>> ids, trained = np.array([1, 2, 3, 4, 5]), np.array([False, False, True, False, True])
        >>> {name: values.tolist() for name, values in without_prompt(ids, trained).items()}
        {'input_ids': [2, 3, 4, 5], 'labels': [-100, 3, -100, 5]}
    """
    kept = trained | np.append(trained[1:], False)
    return {"input_ids": ids[kept], "labels": np.where(trained, ids, -100)[kept]}


def score_alone(
    model: Any,
    ids: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    directory: str | Path,
    of: ReferenceCache,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> list[np.ndarray]:
    """Log-probs of each row's trained tokens without its prompt; rows that ``directory`` holds are not scored again.

    Args:
        model: the base.
        ids, trained: of each row, as for ``rows_in_cache``.
        directory: of the cache, made if absent.
        of: the cache of the whole rows, whose tokenizer and template these answers have.
        logit_scale, logit_softcap: of the model's head.

    Raises:
        CacheMismatchError, ConfigError: the folder holds something else.
    """
    rows = [without_prompt(*row) for row in zip(ids, trained, strict=True)]
    score_rows(
        model,
        rows,
        directory,
        model_id=of.manifest.model_id,
        tokenizer_fingerprint=of.manifest.tokenizer_fingerprint,
        chat_template_fingerprint=of.manifest.chat_template_fingerprint,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
    )
    return read_alone(rows, directory)


def read_alone(rows: Sequence[Row], directory: str | Path) -> list[np.ndarray]:
    """From a finished cache of ``without_prompt`` rows.

    Raises:
        CacheMismatchError: it is not finished, or lacks a row.
    """
    cache = ReferenceCache.open(directory)
    checksums = [row_checksum(row["input_ids"], np.asarray(supervised_mask(row["labels"]))) for row in rows]  # pyright: ignore[reportArgumentType]
    return [cache.row(place)["label_log_probs"] for place in cache.locate(checksums)]
