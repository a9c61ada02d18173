"""What training makes of the user's rows: TRL's preparation in two passes, with our columns carried along."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.data_utils import pack_dataset

from qtarget.core.errors import ConfigError, DataError
from qtarget.core.types import DATA_FIELDS, Target
from qtarget.data.checks.audit import audit_columns
from qtarget.data.checks.findings import Finding, in_order, named
from qtarget.data.checks.flat import FlatRows
from qtarget.data.checks.tokens import Vocabulary, check_positions, trained_whole
from qtarget.data.limits import Limits
from qtarget.data.limits.templates import bounded_templates
from qtarget.data.overlap import shared_rows
from qtarget.filtering.copies import Knowledge, require_witness
from qtarget.integrations.sft.data.columns import (
    TOKEN_COLUMNS,
    locate_rows,
    trained_rows,
    with_token_columns,
)
from qtarget.integrations.sft.data.filtering import RowFilter
from qtarget.integrations.sft.data.ragged import Ragged
from qtarget.integrations.sft.data.weights import announcement, check_weights, weights_of_rows
from qtarget.integrations.sft.data.witnesses import Sources, add_data_columns, heed_copies
from qtarget.integrations.sft.rendering.model_checks import check_with_model, name_end, name_saveable, vocabulary_of
from qtarget.integrations.sft.rendering.renderer import Renderer
from qtarget.integrations.sft.rendering.rows import Rendered, render
from qtarget.integrations.sft.rendering.shape import adopt, is_prepared
from qtarget.integrations.shared.records.samples import describe_rows
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_tokenizer

logger = logging.get_logger(__name__)


class Preparation:
    """Makes training rows of a data set, and keeps what was found on the way.

    TRL cuts rows where it tokenises them, so what the cut loses cannot be seen afterwards. Here it tokenises whole rows
    first; they are audited and get their columns; then it cuts them.

    Attributes:
        audits: messages about each data set, by its name.
        descriptions: each data set as records name it (``describe_rows``).
        filtered: what the filter decided of the training rows, or None without one.
    """

    def __init__(
        self,
        target: Target,
        caches: dict[str, ReferenceCache],
        row_filter: RowFilter | None = None,
        witness: ReferenceCache | None = None,
        group_by: str | None = None,
    ) -> None:
        self._group_by = group_by
        self._target, self._caches, self._filter, self._witness = target, caches, row_filter, witness
        self.filtered: dict[str, Any] | None = None
        self.audits: dict[str, list[str]] = {}
        self._copies: Knowledge | None = None
        if witness is not None:
            require_witness(witness, caches["reference"])
            self._copies, warnings = heed_copies(witness, caches["reference"], target.name)
            self.audits |= {"train": warnings} if warnings else {}
        self.descriptions: dict[str, dict[str, Any]] = {}
        self._adopted: dict[str, list[Finding]] = {}
        self._sources: dict[str, Sources] = {}
        self._unmet: dict[str, tuple[FlatRows, int | None, bool]] = {}
        self._vocabulary: Vocabulary | None = None
        self._frozen: dict[str, Vocabulary] = {}

    def adopt(self, dataset: Any, name: str, text_field: str) -> Any:
        """Rows with the columns of their own shape; TRL's trainer looks at the first row before it prepares any."""
        if isinstance(dataset, dict):
            return type(dataset)({key: self.adopt(part, key, text_field) for key, part in dataset.items()})
        rows, self._adopted[name] = adopt(dataset, name, text_field=text_field)
        needs = self._target.needs
        asked = (needs.reference | needs.teacher) & set(DATA_FIELDS)
        if asked and isinstance(dataset, Dataset) and len(rows) == len(dataset):  # their column is left out here
            self._sources[name] = Sources.of(dataset, self._group_by, text_field)
        return rows

    def compare(self, train: Any, evals: Any, text_field: str) -> None:
        """Say which evaluation rows are trained, too; of streams nobody knows, and nothing where nobody listens."""
        parts = evals if isinstance(evals, dict) else {"eval": evals}
        heard = isinstance(train, Dataset) and logger.isEnabledFor(WARNING)
        for name, rows in parts.items() if heard else ():
            if isinstance(rows, Dataset):  # as Python objects: a format of tensors or arrays has no values to compare
                lines = shared_rows(train.with_format(None), rows.with_format(None), text_field=text_field)
                self._say(name, [Finding("shared_rows", "warning", len(rows), (), line) for line in lines])

    def meet(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        frozen: Mapping[str, PreTrainedModel],
        saves_model: bool,
        chat_stream: bool = False,
    ) -> None:
        """Check the rows prepared so far, and all later ones, against the model, whose generation will stop where they end.

        Args:
            model: without its adapter.
            frozen: models that run beside it, by role.
            saves_model: whether it is saved as one model, and not as an adapter.
            chat_stream: the training rows are a stream of chats, whose ends nobody has seen.

        Raises:
            DataError: token ids that the model has no embedding for, or rows beyond a model's table of positions.
            ConfigError: a generation config that could not be saved.
        """
        self._vocabulary = vocabulary_of(model, tokenizer)
        self._frozen = {f"the frozen {role}": vocabulary_of(one, tokenizer) for role, one in frozen.items()}
        self._say("train", name_saveable(model))
        if chat_stream:
            self._say("train", name_end(model, tokenizer, None, saves_model=saves_model))
        for name, (rows, *_) in list(self._unmet.items()):
            if name == "train":
                self._say(name, name_end(model, tokenizer, rows, saves_model=saves_model))
            self._check_with_model(name)

    def _check_with_model(self, name: str) -> None:
        if self._vocabulary is None:
            return
        rows, max_length, filled = self._unmet.pop(name)
        found = check_with_model(rows, max_length, filled, self._vocabulary)
        for whose, theirs in self._frozen.items():
            ours = self._vocabulary
            if (theirs.positions, theirs.has_table) == (ours.positions, ours.has_table):  # said already
                continue
            found += check_positions(rows, theirs, max_length, filled=filled, whose=whose)
        self._say(name, [finding for finding in found if finding.severity != "error"])
        Rendered(None, found).raise_errors(name)

    def prepare(
        self,
        dataset: Any,
        name: str,
        *,
        trl: Callable[..., Any],
        args: Any,
        tokenizer: Any,
        chat_template: str | None,
        packing: bool,
        formatting_func: Any,
        completion_only: bool,
    ) -> Dataset:
        """Rows with ``input_ids``, ``labels`` and ``TOKEN_COLUMNS``, packed where that is asked for.

        Args:
            trl: ``SFTTrainer._prepare_dataset`` of the trainer.
            chat_template: TRL's training template where it replaces the tokenizer's own.
            completion_only: ``completion_only_loss`` as the trainer decided it.

        Raises:
            DataError: rows that cannot be counted, would not be trained as written, or nothing to train on.
            ConfigError: packing that cuts cached rows apart.
            CacheMismatchError: rows that a cache does not hold.
        """
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"the {name} data is a {type(dataset).__name__}; expected a datasets.Dataset with rows that can be counted"
            )
        if is_prepared(dataset):
            return dataset
        cuts_rows = packing and args.packing_strategy != "bfd"
        if cuts_rows and self._caches:
            raise ConfigError(
                f"packing_strategy {args.packing_strategy!r} cuts rows apart, and cached rows are whole; use 'bfd'"
            )
        whole = changed(args, max_length=None, shuffle_dataset=False)
        if name not in self._adopted and formatting_func is None:
            dataset = self.adopt(dataset, name, args.dataset_text_field)
        check_weights(dataset, self._target, args)
        renderer = Renderer(
            tokenizer, chat_template, args.dataset_text_field, args.assistant_only_loss, completion_only
        )
        with bounded_templates(Limits.of(args.limits).template_seconds):
            rendered = render(dataset, name, trl=trl, args=whole, renderer=renderer, formatting_func=formatting_func)
        found = [*self._adopted.pop(name, []), *rendered.findings]
        self._say(name, [finding for finding in found if finding.severity != "error"])
        rendered.raise_errors(name)
        tokens: Any = rendered.tokens
        nothing_to_cut = self._audit(tokens, args, name, cuts_rows)
        weights = weights_of_rows(tokens, tokenizer, chat_template, args)
        for line in [] if weights is None else announcement(tokens, weights, args.prompt_weight):
            logger.warning(f"{name} data: {line}")
        if weights is None and not args.assistant_only_loss:
            self._say(name, trained_whole(dataset))
        rest = changed(args, max_length=None) if nothing_to_cut else args
        tokens = trl(tokens, tokenizer, whole if cuts_rows else rest, False, None, name)
        tokens = with_token_columns(
            tokens,
            weights,
            keep_end=args.truncation_mode == "keep_end",
            all_tokens=args.prompt_weight is not None,
        )
        zero_masks = args.weights_scale == "all"
        if weights is not None:
            tokens = trained_rows(tokens, weights, zero_masks=zero_masks, name=name)
        if self._filter is not None and name == "train":
            tokens, self.filtered = self._filter.apply(tokens)
        self.descriptions[name] = describe_rows(tokens, zero_masks=zero_masks)
        tokens = self._with_frozen(tokens, name, tokenizer, chat_template, zero_masks, self._sources.get(name))
        return packed(tokens, args) if packing else tokens

    def _audit(self, tokens: Dataset, args: Any, name: str, cuts_rows: bool) -> bool:
        """Say what trains on nothing; whether TRL would neither cut nor drop a row."""
        ids, labels = Ragged.of(tokens, "input_ids"), Ragged.of(tokens, "labels")
        lengths, other = ids.lengths, np.flatnonzero(ids.lengths != labels.lengths)
        if len(other):
            raise DataError(f"the {name} data has other numbers of labels than of input_ids: {named(other.tolist())}")
        report = audit_columns(
            lengths,
            labels.values,
            max_length=None if cuts_rows else args.max_length,
            keep_end=args.truncation_mode == "keep_end",
        )
        self._say(name, list(report.findings.values()))
        report.raise_if_unusable()
        self._unmet[name] = FlatRows(ids.values, labels.values, lengths), args.max_length, cuts_rows
        self._check_with_model(name)
        return not report.unusable_rows and bool((lengths <= (args.max_length or len(labels.values))).all())

    def _say(self, name: str, findings: list[Finding]) -> None:
        """Print errors and warnings, and keep them for records; facts go to the log at level info."""
        said = self.audits.setdefault(name, [])
        for found in in_order(findings):
            (logger.info if found.severity == "info" else logger.warning)(f"{name} data: {found.message}")
            said += [found.message] if found.severity != "info" else []

    def _with_frozen(
        self,
        tokens: Dataset,
        name: str,
        tokenizer: Any,
        chat_template: str | None,
        zero_masks: bool,
        sources: Sources | None,
    ) -> Dataset:
        for cache in (*self._caches.values(), *([self._witness] if self._witness else [])):
            cache.require(
                tokenizer_fingerprint=fingerprint_tokenizer(tokenizer),
                chat_template_fingerprint=fingerprint_chat_template(chat_template or tokenizer),
            )
        for role, cache in self._caches.items():
            tokens = locate_rows(tokens, cache, role, name)
            tokens = add_data_columns(
                tokens, cache, role, self._target, zero_masks=zero_masks, witness=self._witness, sources=sources,
                name=name, decode=tokenizer.decode, knowledge=self._copies,
            )  # fmt: skip
        return tokens


def packed(tokens: Dataset, args: Any) -> Dataset:
    """Rows packed by TRL to ``max_length``, with our columns.

    Raises:
        ConfigError: there is no ``max_length``.
    """
    columns = [c for c in ("input_ids", "labels", *TOKEN_COLUMNS) if c in tokens.column_names]
    if args.max_length is None:
        raise ConfigError("packing fills rows of max_length tokens; set max_length")
    rows = pack_dataset(tokens.select_columns(columns), args.max_length, args.packing_strategy)
    return (
        rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows
    )  # the order of packed rows follows their lengths


def changed(args: Any, **values: Any) -> Any:
    """A shallow copy with some fields set (dataclasses.replace would run TrainingArguments' set-up again)."""
    changed = copy.copy(args)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed
