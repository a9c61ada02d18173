"""The rows of a run: prompts, and what rewards compare with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset

from qtarget.core.errors import DataError


@dataclass(frozen=True)
class Prompts:
    """What is known of the data, by name; stands where demonstrations are prepared."""

    descriptions: dict[str, dict[str, Any]]


def describe_prompts(dataset: Any) -> dict[str, Any]:
    """Rows and a BLAKE2b over them in their order; of a stream nothing is known."""
    if not isinstance(dataset, Dataset):
        return {"rows": None, "fingerprint": None}
    state = hashlib.blake2b(digest_size=16)
    for row in dataset:
        state.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"rows": len(dataset), "fingerprint": state.hexdigest()}


def check_prompts(train: Any, evals: Any, environments: bool) -> None:
    """Refuse data without prompts, before a model is loaded.

    Raises:
        DataError: no data, no rows, or no column ``prompt``.
    """
    if train is None and not environments:
        raise DataError("`train_dataset` is required; pass a datasets.Dataset with a column `prompt`")
    several: Any = evals if isinstance(evals, dict | DatasetDict) else {"eval": evals}
    for name, data in {"train": train, **several}.items():
        if data is None:
            continue
        if not isinstance(data, Dataset | IterableDataset):
            raise DataError(
                f"the {name} data is a {type(data).__name__}; expected a datasets.Dataset or IterableDataset"
            )
        columns = data.column_names
        if columns is not None and "prompt" not in columns:
            raise DataError(
                f"the {name} data has the columns {', '.join(columns)} and no `prompt`; the model writes the answers itself: give "
                "each row a prompt (text, or messages that end with the user), and what rewards compare with in other columns"
            )
        if isinstance(data, Dataset) and not len(data):
            raise DataError(f"the {name} data has no rows; check the path and the split")
