"""``filter:`` of a training config: rows leave after a cache is attached, so one cache serves filtered and unfiltered runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers.utils import logging

from qtarget.command import command_for, crossfit_command
from qtarget.core.errors import CacheMismatchError, ConfigError, MissingStatisticError
from qtarget.data.checks.findings import named
from qtarget.filtering import WITNESSES, Decision, Filter, decide
from qtarget.filtering.alone import read_alone, without_prompt
from qtarget.filtering.copies import require_witness
from qtarget.filtering.lookup import rows_in_cache
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.data.arrow import list_array, list_batches, with_columns
from qtarget.integrations.sft.data.columns import supervised
from qtarget.integrations.sft.data.weights import ROW
from qtarget.integrations.shared.frozen import way_out
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import MANIFEST
from qtarget.scoring.cache.signature import read_key

logger = logging.get_logger(__name__)

ALONE = "-alone"
"""Ends the name of the folder beside a cache that holds the answers without their prompts."""


def alone_folder(cache: str | Path) -> Path:
    """Where the answers of a cache's rows are scored without their prompts."""
    path = Path(cache)
    return path.with_name(path.name + ALONE)


@dataclass(frozen=True)
class RowFilter:
    """A filter, the cache that it asks, and a cross-fitted one where there is one; ``signed``: caches are checked by a key."""

    wanted: Filter
    cache: ReferenceCache
    witness: ReferenceCache | None = None
    signed: bool = False

    def apply(self, dataset: Dataset) -> tuple[Dataset, dict[str, Any]]:
        """The rows that stay, weighted where that is asked for, and what was decided.

        Args:
            dataset: tokenised and numbered rows, cut as training cuts them, not packed yet.

        Raises:
            CacheMismatchError: a row was never scored.
            ConfigError: no row would be left.
            MissingStatisticError: ``gain``, and nobody scored the answers without their prompts.
        """
        ids, masks = [], []
        for offsets, tokens, labels in list_batches(dataset, "input_ids", "labels"):
            mask = supervised(offsets, labels)
            ids += [tokens[a:b] for a, b in pairwise(offsets.tolist())]
            masks += [mask[a:b] for a, b in pairwise(offsets.tolist())]
        numbers = np.asarray(dataset[ROW][:])
        alone = None
        if self.wanted.rule == "gain":
            folder = alone_folder(self.cache.path)
            if not (folder / MANIFEST).is_file():
                raise MissingStatisticError(
                    f"filter: gain asks what the base says of answers without their prompts, which {folder} does not hold yet: run "
                    f"`{command_for('filter', '--rule', 'gain')}` once"
                )
            alone = read_alone([without_prompt(*row) for row in zip(ids, masks, strict=True)], folder)
        decision = decide(
            rows_in_cache(self.cache, ids, masks, numbers, alone, self.witness, sided=not self.signed), self.wanted
        )
        weighs = self.wanted.form == "weight" and decision.tells
        kept = decision.weights > 0 if weighs else decision.keep
        self._say(decision, numbers[~kept])
        record = {
            "rule": decision.rule, "as": self.wanted.form, "verdict": decision.verdict, "rows": len(kept),
            "left_out": int((~kept).sum()), "threshold": decision.threshold, "summary": decision.summary,
        }  # fmt: skip
        if weighs:
            record["mean_weight"] = float(decision.weights.mean())
            dataset = _weighted(dataset, dict(zip(numbers.tolist(), decision.weights.tolist(), strict=True)))
        return dataset.select(np.flatnonzero(kept)) if not kept.all() else dataset, record

    def _say(self, decision: Decision, left_out: np.ndarray) -> None:
        which = f"; left out: {named(left_out.tolist())}" if len(left_out) else ""
        if self.wanted.form == "weight":
            said = (
                f"each row is weighed by P(right), mean {decision.weights.mean():.2f}"
                if decision.tells
                else "no row is weighed"
            )
            which = f"; {said}{which}"
        logger.warning(f"train data: filter: {decision.summary}{which}")


def open_filter(args: QTargetConfig, caches: dict[str, ReferenceCache], dataset: Any) -> RowFilter | None:
    """The filter of a config, or None where it asks for none.

    Args:
        caches: those that the target has open.
        dataset: the training data, which must have rows that can be counted.

    Raises:
        MissingStatisticError: there is no ``reference_cache``, or no ``witness`` for a rule that asks one.
        ConfigError: a stream of rows.
        CacheMismatchError: a cache is damaged, or the witness is none of this base.
    """
    wanted = Filter.of(args.filter)
    if not wanted:
        return None
    if dataset is not None and not hasattr(dataset, "__len__"):
        raise ConfigError(
            "filter compares all rows before training, and a stream has no end; load the rows, or leave it out"
        )
    if args.reference_cache is None:
        raise MissingStatisticError(
            f"filter compares what the frozen base says of all rows, before training: {way_out('reference')}"
        )
    key = None if args.cache_verify_key is None else read_key(args.cache_verify_key)
    cache = caches.get("reference") or ReferenceCache.open(args.reference_cache, key=key)
    return RowFilter(wanted, cache, open_copies(args.witness, wanted, cache, key), key is not None)


def open_copies(
    path: str | None, wanted: Filter, reference: ReferenceCache, key: bytes | None = None
) -> ReferenceCache | None:
    """The cross-fit for a filter; None where the rule asks none and none is finished.

    Args:
        path: of ``witness``.

    Raises:
        MissingStatisticError: the rule asks copies, and no folder of theirs is named.
        CacheMismatchError: it is damaged, no cross-fit, or one of another base.
    """
    asked = wanted.rule in WITNESSES and WITNESSES[wanted.rule].asks_copies
    if path is None and asked:
        raise MissingStatisticError(
            f"filter: {wanted.rule} asks copies that have not seen the rows: leave witness unset and `qtarget train` trains them "
            f"first, or {crossfit_command()}"
        )
    if path is None or not (asked or (Path(path) / MANIFEST).is_file()):
        return None
    if not Path(path).is_dir():
        raise CacheMismatchError(f"there is no witness {path}; {crossfit_command(path)}")
    found = ReferenceCache.open(path, key=key)
    require_witness(found, reference)
    return found


def _weighted(dataset: Dataset, weights: dict[int, float]) -> Dataset:
    """The same rows, each token's weight times its row's."""

    def columns(table: pa.Table) -> pa.Table:
        lengths = table["input_ids"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
        found = np.repeat([weights[number] for number in table[ROW].to_pylist()], lengths).astype(np.float32)
        if "loss_weights" in table.column_names:
            found *= table["loss_weights"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return pa.table({"loss_weights": list_array(np.concatenate([[0], np.cumsum(lengths)]), found)})

    return with_columns(dataset, columns, "Weighing rows")
