"""What is known of a token only when all rows are: what the other rows say of it, and what a cross-fit does.

Each source of the data (a column such as ``source``) is judged by itself: a base may know one format and not another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset
from datasets.utils import tqdm
from transformers.utils import logging

from qtarget.core.types import COUNTED_FIELDS, DATA_FIELDS, WITNESS_FIELDS, Target
from qtarget.data.agreement import confident_choices, contexts_of, counted_flat
from qtarget.data.agreement.ngrams import FlatTokens
from qtarget.data.crossfit.witness import witness_fields
from qtarget.data.fields import GROUP_COLUMNS
from qtarget.data.groups import LANGUAGE, row_groups
from qtarget.filtering.copies import Knowledge, judge_copies, next_step, refuse_behind
from qtarget.integrations.sft.data.arrow import flat_lists, list_array, list_batches, with_columns
from qtarget.integrations.sft.data.columns import locate_rows, supervised
from qtarget.integrations.sft.data.start import can_weigh, silent_rows, start_weights
from qtarget.integrations.sft.data.weights import ROW
from qtarget.scoring.cache.reader import ReferenceCache

logger = logging.get_logger(__name__)

WITNESS = "witness"
"""The role under which rows are located in a cross-fitted cache; the column is not kept."""


MOST_SOURCES = 50
"""A column of more different values names rows, and no sources."""


@dataclass(frozen=True)
class Sources:
    """Where rows come from, by the first column that says so and has at most ``MOST_SOURCES`` values.

    Attributes:
        column: its name; empty where there is none.
        of_row: the value of each numbered row.
    """

    column: str = ""
    of_row: np.ndarray | None = None

    @classmethod
    def of(cls, dataset: Dataset, column: str | None = None, text_field: str = "text") -> Sources:
        """Of rows that are yet to be numbered, or are.

        Args:
            column: see ``qtarget.data.groups.row_groups``.

        Raises:
            ConfigError: no such column.
            MissingDependencyError: a language is to be detected, without the library.

        Example:
            >>> Sources.of(Dataset.from_list([{"text": "a", "source": "web"}])).column
            'source'
        """
        detected = column == LANGUAGE and LANGUAGE not in dataset.column_names
        asked = GROUP_COLUMNS if column is None else (column,)
        read = dataset.column_names if detected else [name for name in asked if name in dataset.column_names]
        rows = dataset.select_columns(read).to_list() if read else [dict.fromkeys(dataset.column_names)]
        found = row_groups(rows, column, text_field=text_field, at_most=MOST_SOURCES)
        if found is None or not len(dataset):
            return cls()
        numbers = np.asarray(dataset[ROW][:]) if ROW in dataset.column_names else np.arange(len(dataset))
        values = np.full(int(numbers.max()) + 1, "", dtype=object)
        values[numbers] = found[1]
        return cls(found[0], values)

    def groups(self, numbers: np.ndarray) -> tuple[list[str], np.ndarray]:
        """The names of the sources of these rows, and which of them each is of."""
        if self.of_row is None or not len(numbers) or numbers.max() >= len(self.of_row):
            return [""], np.zeros(len(numbers), dtype=np.int64)
        names, index = np.unique(np.array([str(value) for value in self.of_row[numbers]]), return_inverse=True)
        return names.tolist(), index


@dataclass(frozen=True)
class Trained:
    """The trained tokens of a data set, with what a cache says of them.

    Attributes:
        flat: all tokens.
        known: ``[trained tokens]`` log-probs of a frozen model, nats.
        said: ``[trained tokens]`` what it is sure of (``confident_choices``), or None.
    """

    flat: FlatTokens
    known: np.ndarray
    said: np.ndarray | None = None


def add_data_columns(
    dataset: Dataset,
    cache: ReferenceCache,
    role: str,
    target: Target,
    *,
    zero_masks: bool,
    witness: ReferenceCache | None = None,
    sources: Sources | None = None,
    name: str = "train",
    decode: Callable[[list[int]], str] = str,
    knowledge: Knowledge | None = None,
) -> Dataset:
    """Add those of ``DATA_FIELDS`` that the target asks for, judged within this data set; 0 where not trained on.

    The log says what each source is worth, and which training rows start with hardly any weight.

    Args:
        dataset: located rows, not packed yet.
        target: nothing is done where it needs no data field of this role.
        zero_masks: whether tokens of weight 0 neither count nor are counted.
        witness: a cross-fitted cache of these rows, for ``WITNESS_FIELDS``.
        sources: where the rows come from; each source is judged by itself.
        name: of the data set, for messages; rows teach in ``train`` alone.
        decode: shows a row's tokens.
        knowledge: what the copies know of the rows; shares of noise are told only where they know them.

    Raises:
        CacheMismatchError: a row that the cross-fit has not judged.
    """
    fields, trains = getattr(target.needs, role), name == "train"
    if not fields & set(DATA_FIELDS):
        return dataset
    offsets, ids = flat_lists(dataset, "input_ids")
    scored = supervised(offsets, flat_lists(dataset, "labels")[1])
    mask = scored & (flat_lists(dataset, "loss_weights")[1] != 0) if _masks(dataset, zero_masks) else scored
    flat = FlatTokens(ids.astype(np.int32, copy=False), mask, offsets)
    places = _places(dataset, role)
    rows = known_of(cache, places, scored, flat, with_choices=bool(fields & set(COUNTED_FIELDS)))
    names, of_row = (sources or Sources()).groups(np.asarray(dataset[ROW][:]))
    groups = of_row[flat.rows]
    found: dict[str, np.ndarray] = {}
    if fields & set(COUNTED_FIELDS):
        found |= _counted(rows, fields, groups)
        if "reliability" in found and trains:
            told = [float(found["reliability"][groups == g].mean()) for g in range(len(names))]
            say(
                f"{role}: reliability of the frozen model, mean over the trained tokens",
                names,
                [f"{v:.2f}" for v in told],
            )
    if fields & set(WITNESS_FIELDS):
        assert witness is not None, "the trainer opened it"
        judged = locate_rows(dataset, witness, WITNESS, name)
        copies = known_of(witness, _places(judged, WITNESS), scored, flat, with_choices=False)
        told_of, verdicts = witness_fields(rows.known, copies.known, flat.rows, groups)
        found |= told_of
        doubted = knowledge is not None and not knowledge.known
        lines = [verdicts[g].words(doubted) for g in range(len(names))]
        say(f"{name} data, by copies that have not seen the rows", names, lines)
    if trains and can_weigh(target):
        weights = start_weights(target, rows.known, found, role)

        def text(row: int) -> str:
            a, b = offsets[row], offsets[row + 1]
            return decode(ids[a:b][mask[a:b]].tolist())

        numbers = np.asarray(dataset[ROW][:])
        for line in silent_rows(weights, flat.rows, flat.counts, names, of_row, text, numbers):
            logger.warning(f"{name} data, {line}" if names != [""] else f"{name} data: {line}")
    return with_flat(dataset, {f"{role}_{field}": values for field, values in found.items()}, flat)


def _masks(dataset: Dataset, zero_masks: bool) -> bool:
    return zero_masks and "loss_weights" in dataset.column_names


def _places(dataset: Dataset, role: str) -> list[int]:
    """The cache row of each row: it stands at each of its tokens, and no row is empty."""
    batches = list_batches(dataset, f"{role}_rows")
    return np.concatenate([values[offsets[:-1]] for offsets, values in batches]).tolist()


def _counted(rows: Trained, fields: frozenset[str], groups: np.ndarray) -> dict[str, np.ndarray]:
    with tqdm(
        total=contexts_of(rows.flat), desc="Counting what rows agree on", unit=" contexts", unit_scale=True
    ) as bar:
        return counted_flat(rows.flat, rows.known, fields, rows.said, bar.update, groups)


def known_of(
    cache: ReferenceCache, places: list[int], scored: np.ndarray, flat: FlatTokens, *, with_choices: bool
) -> Trained:
    """What a cache says of the trained tokens.

    Args:
        places: the cache row of each row.
        scored: ``[tokens]`` which tokens have numbers in the cache; those that are trained are among them.
        with_choices: also what the model is sure of, if the cache lists more than labels.
    """
    known = np.empty(len(flat.rows), dtype=np.float32)
    said = np.empty(len(flat.rows), dtype=np.int32) if with_choices and cache.has_topk else None
    done = 0
    for place, a, b in zip(places, flat.offsets[:-1].tolist(), flat.offsets[1:].tolist(), strict=True):
        numbers, trained = cache.row(place), flat.mask[a:b][scored[a:b]]
        end = done + int(trained.sum())
        known[done:end] = numbers["label_log_probs"][trained]
        if said is not None:
            said[done:end] = confident_choices(numbers["topk_ids"][trained], numbers["topk_log_probs"][trained])
        done = end
    return Trained(flat, known, said)


def with_flat(dataset: Dataset, columns: dict[str, np.ndarray], flat: FlatTokens) -> Dataset:
    """The data set with columns of ``[trained tokens]`` spread over all tokens, 0 elsewhere."""
    place = {number: index for index, number in enumerate(dataset[ROW][:])}
    whole = {name: np.zeros(len(flat.ids), dtype=np.float32) for name in columns}
    for name, values in columns.items():
        whole[name][flat.mask] = values

    def made(table: pa.Table) -> pa.Table:
        rows = np.array([place[number] for number in table[ROW].to_pylist()])
        lengths = flat.offsets[rows + 1] - flat.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(offsets[-1]) + np.repeat(flat.offsets[rows] - offsets[:-1], lengths)
        return pa.table({name: list_array(offsets, values[index]) for name, values in whole.items()})

    return with_columns(dataset, made, f"Adding {', '.join(sorted(columns))}")


def say(what: str, names: list[str], values: list[str]) -> None:
    """One line for all sources, or one each."""
    for name, value in zip(names, values, strict=True):
        logger.warning(f"{what}: {value}" if name == "" else f"{what}, {name}: {value}")


def heed_copies(witness: ReferenceCache, reference: ReferenceCache, target: str) -> tuple[Knowledge, list[str]]:
    """What the copies of a target's witness know, before anything is trained; and what the run has to be warned of.

    Raises:
        MissingStatisticError: training made the copies no better than the base: what they say is no evidence.
    """
    knowledge = judge_copies(witness, reference)
    refuse_behind(knowledge, witness, f"target {target}")
    if knowledge.known:
        return knowledge, []
    warning = (
        f"{knowledge.sentence}, so {target} learns slowly where they should vouch; {next_step(knowledge, witness)}"
    )
    logger.warning(f"train data: {warning}")
    return knowledge, [warning]
