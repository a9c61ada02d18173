"""``SFTTrainer`` with any target: TRL's data handling, PEFT, accelerate, checkpoints; our loss from hidden states."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.api import label_weights
from qtarget.core.errors import CacheMismatchError, ConfigError, DataError, NonFiniteLossError
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead, Reference
from qtarget.data.checks.audit import audit_rows
from qtarget.integrations.heads import HeadSpec, add_target_head, probe_head
from qtarget.integrations.live import LiveRecords, evaluation_prefix
from qtarget.integrations.progress import TokenSums
from qtarget.integrations.samples import RowSamples, describe_rows
from qtarget.integrations.step import ROLES, TargetOutput, TargetStep, live_head, pop_reference, shifted
from qtarget.integrations.teacher import head_rows, load_named, open_caches, truncate_reference, vocab_with_teacher
from qtarget.integrations.trl_config import QTargetConfig
from qtarget.integrations.trl_data import (
    TOKEN_COLUMNS,
    TargetCollator,
    add_data_columns,
    add_token_columns,
    cut_to_tokens,
    locate_rows,
    with_row_ids,
)
from qtarget.loss.chunked import frozen_label_statistics
from qtarget.loss.zero3 import is_split, whole_shape
from qtarget.registry import get_target
from qtarget.scoring.cache.schema import fingerprint_chat_template, fingerprint_model, fingerprint_tokenizer

logger = logging.get_logger(__name__)

COMPLETE_MARK = "qtarget_complete"
"""Written last into a checkpoint folder: without it the checkpoint was cut off while being saved."""


class QTargetTrainer(SFTTrainer):
    """TRL's ``SFTTrainer`` with the loss of a target; arguments are TRL's.

    Args:
        model: a name, path or model, as in TRL.
        args: a ``QTargetConfig``.
        train_dataset, eval_dataset: as in TRL (``messages``, ``prompt`` + ``completion``, ``text`` or tokens), with an
            optional ``weight`` a row or a message, or ``loss_weights`` a token.
        reference_model, teacher_model: frozen models run live, where the target needs one and no cache is given.

    Raises:
        MissingStatisticError: the target needs a frozen model and none is given.
        CacheMismatchError: the cache was made from other rows, another model, tokenizer or chat template.
        DataError: nothing to train on.
        UnsupportedModelError: a head that the loss cannot rebuild.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "qtarget"]

    def __init__(
        self,
        model: Any,
        args: QTargetConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reference_model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, QTargetConfig):
            raise ConfigError(f"args is a {type(args).__name__}; expected qtarget.integrations.trl_sft.QTargetConfig")
        for name in ("compute_loss_func", "data_collator"):
            if kwargs.get(name) is not None:
                raise ConfigError(f"{name} would bypass the target; leave it out, or use TRL's SFTTrainer")
        for name, dataset in (("train", train_dataset), ("eval", eval_dataset)):
            if isinstance(dataset, Dataset) and not len(dataset):
                raise DataError(f"the {name} data has no rows; check the path and the split")
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):  # pyright: ignore[reportAttributeAccessIssue]
            raise ConfigError(
                "skip_prepare_dataset leaves rows unnumbered; leave it out: tokenised rows are taken as they are"
            )
        self.target = args.build_target()
        self.caches = open_caches(args, self.target, {"reference": reference_model, "teacher": teacher_model})
        self.audits: dict[str, list[str]] = {}
        self.data_descriptions: dict[str, dict[str, Any]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        if self.aux_loss_enabled:
            raise ConfigError(
                "mixture-of-experts load balancing is not part of the target loss; set router_aux_loss_coef: 0"
            )
        # compute_loss divides by num_items_in_batch whatever the model's forward takes
        self.model_accepts_loss_kwargs = True
        self.data_collator = self._collator()
        base = self._base_model()
        with self.accelerator.autocast():  # as in training: some attention kernels refuse float32
            self.head_spec = probe_head(base)
        add_target_head(base, self.head_spec)
        self._check_caches(base)
        self.frozen_models = self._load_frozen({"reference": reference_model, "teacher": teacher_model})
        self.vocab_rows = None
        if "teacher" in self.caches or "teacher" in self.frozen_models:
            live = self.frozen_models.get("teacher")
            rows = head_rows(live[0]) if live else self.caches["teacher"].manifest.vocab_size
            self.vocab_rows = vocab_with_teacher(args, head_rows(base), rows, self.processing_class)
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        self._samples = RowSamples(args.heatmap_rows)
        self._records = LiveRecords(self._samples, self.data_descriptions, self.callback_handler.callbacks)
        self.callback_handler.callbacks.insert(0, self._records)  # before the trackers, see its docstring

    # -- set-up ---------------------------------------------------------------------------------------------

    def _base_model(self) -> PreTrainedModel:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _collator(self) -> TargetCollator:
        theirs: Any = self.data_collator
        return TargetCollator(
            pad_token_id=theirs.pad_token_id,
            padding_free=theirs.padding_free,
            return_position_ids=theirs.return_position_ids,
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            caches=self.caches,
            with_topk={role: "distribution" in getattr(self.target.needs, role) for role in self.caches},
        )

    def _check_caches(self, base: PreTrainedModel) -> None:
        """A reference is the model that training starts from, unless the configuration names another."""
        head: Any = base.get_output_embeddings()
        unnamed = [role for role in self.caches if getattr(self.args, f"{role}_model_name_or_path") is None]
        ours = fingerprint_model(base) if unnamed else None
        for role, cache in self.caches.items():
            if role == "reference":
                cache.require(vocab_size=whole_shape(head.weight)[0])
            named = getattr(self.args, f"{role}_model_name_or_path")
            if named is not None and cache.manifest.model_id != named:
                raise CacheMismatchError(
                    f"{role}_cache was made with model {cache.manifest.model_id!r}, {role}_model_name_or_path says {named!r}; "
                    "score again with that model, or correct the name"
                )
            if named is None and role == "reference":
                cache.require(model_fingerprint=ours)
            elif named is None and cache.manifest.model_fingerprint == ours:
                logger.warning(
                    "teacher_cache was made with the very model that is trained: the teacher is the base itself"
                )

    def _load_frozen(self, given: dict[str, PreTrainedModel | None]) -> dict[str, tuple[PreTrainedModel, HeadSpec]]:
        loaded: dict[str, tuple[PreTrainedModel, HeadSpec]] = {}
        for role in ROLES:
            model, path = given[role], getattr(self.args, f"{role}_model_name_or_path")
            if role in self.caches or not getattr(self.target.needs, role) or (model is None and path is None):
                continue
            if is_deepspeed_zero3_enabled() and (model is None or any(is_split(p) for p in model.parameters())):
                raise ConfigError(
                    f"DeepSpeed ZeRO-3 splits what is loaded under it, and no engine gathers a frozen {role}; score it once "
                    f"(`qtarget score CONFIG.yaml --role {role}`), or pass {role}_model as a model loaded before the config"
                )
            if model is None:
                model = load_named(AutoModelForCausalLM, f"{role} model", path, dtype=self._base_model().dtype)
            model = model.to(self.accelerator.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
            with self.accelerator.autocast():
                loaded[role] = (model, probe_head(model))
        return loaded

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's preparation in two passes, so that what truncation cuts can be counted and named before step one."""
        if not isinstance(dataset, Dataset):
            raise DataError(
                f"the {dataset_name} data is a {type(dataset).__name__}; expected a datasets.Dataset with rows that can be counted"
            )
        if "row_ids" in dataset.column_names:
            return dataset
        cuts_rows = packing and args.packing_strategy != "bfd"
        if cuts_rows and self.caches:
            raise ConfigError(
                f"packing_strategy {args.packing_strategy!r} cuts rows apart, and cached rows are whole; use 'bfd'"
            )
        whole = changed(args, max_length=None, shuffle_dataset=False)
        tokens = self._tokenise(with_row_ids(dataset), processing_class, whole, formatting_func, dataset_name)
        self._audit(tokens, changed(args, max_length=None) if cuts_rows else args, dataset_name)
        tokens = add_token_columns(tokens, processing_class, self.chat_template)
        fitting = whole if cuts_rows else args
        tokens: Any = super()._prepare_dataset(tokens, processing_class, fitting, False, None, dataset_name)
        tokens = cut_to_tokens(tokens, keep_end=args.truncation_mode == "keep_end")
        self.data_descriptions[dataset_name] = describe_rows(tokens)
        for role, cache in self.caches.items():
            cache.require(
                tokenizer_fingerprint=fingerprint_tokenizer(processing_class),
                chat_template_fingerprint=fingerprint_chat_template(self.chat_template or processing_class),
            )
            tokens = locate_rows(tokens, cache, role, dataset_name)
            tokens = add_data_columns(tokens, cache, role, getattr(self.target.needs, role))
        if not packing:
            return tokens
        columns = [c for c in ("input_ids", "labels", *TOKEN_COLUMNS) if c in tokens.column_names]
        if args.max_length is None:
            raise ConfigError("packing fills rows of max_length tokens; set max_length")
        packed = pack_dataset(tokens.select_columns(columns), args.max_length, args.packing_strategy)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _tokenise(self, dataset, processing_class, args, formatting_func, dataset_name) -> Dataset:
        try:
            return super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)  # pyright: ignore[reportReturnType]
        except RuntimeError as error:
            if "assistant" not in str(error):
                raise
            raise DataError(
                f"the {dataset_name} data has rows without a single assistant token under assistant_only_loss; mark assistant "
                "text with {% generation %} ... {% endgeneration %} in the chat template, or drop those rows"
            ) from error

    def _audit(self, tokens: Dataset, args: Any, dataset_name: str) -> None:
        rows: Any = tokens
        report = audit_rows(rows, max_length=args.max_length, keep_end=args.truncation_mode == "keep_end")
        self.audits[dataset_name] = report.messages()
        for message in self.audits[dataset_name]:
            logger.warning(f"{dataset_name} data: {message}")
        report.raise_if_unusable()

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "seq_lengths", *TOKEN_COLUMNS]

    # -- one step -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """TRL's, plus the label weights of batch-scope targets over the whole optimizer batch and all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.target.scope == "batch" and batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            self._attach_label_weights(batches)
        return batches, num_items

    @torch.no_grad()
    def _attach_label_weights(self, batches: list[dict[str, Any]]) -> None:
        runs = [self._statistics_pass(self._prepare_inputs(dict(batch))) for batch in batches]
        union = [torch.cat([run[i] for run in runs]) for i in range(3)]
        log_probs, reference, ids = (_gather_ragged(self.accelerator, value) for value in union)
        weights = label_weights(
            self.target, log_probs, reference=Reference(label_log_probs=reference), sequence_ids=ids
        )
        start = int(_counts_before(self.accelerator, len(union[0])))
        for batch, run in zip(batches, runs, strict=True):
            mask = batch["labels"].clone()
            mask[:, 0] = -100
            mask = mask != -100
            full = torch.zeros(mask.shape, dtype=torch.float32)
            full[mask.cpu()] = weights[start : start + len(run[0])].float().cpu()
            batch["label_weights"] = full.to(batch["labels"].device)
            start += len(run[0])

    def _statistics_pass(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Live and reference label log-probs and row ids of the supervised tokens of one micro-batch."""
        step, model_inputs = self._step(inputs, None)
        wrapped: Any = self.model_wrapped
        frozen = step.frozen.get("reference")
        step.target, step.backend = get_target("sft"), "auto"
        output = wrapped(**model_inputs, target_loss=step)
        mask = step.labels[:, 1:] != -100
        live = output.label_log_probs[mask]
        reference = torch.zeros_like(live)  # for rules that look at the live model alone
        moved = shifted(frozen)
        if moved is not None:
            kept = moved.flatten(tuple(mask.shape)).rows(mask.reshape(-1).nonzero()[:, 0])
            known = frozen_label_statistics(kept, step.labels[:, 1:][mask]) if isinstance(kept, FrozenHead) else kept
            assert known.label_log_probs is not None
            reference = known.label_log_probs
        assert step.sequence_ids is not None
        return live, reference.to(live), step.sequence_ids[:, 1:][mask]

    def _step(self, inputs: dict[str, Any], num_items: Any) -> tuple[TargetStep, dict[str, Any]]:
        """Split a batch into the loss's part and the model's."""
        if "shift_labels" in inputs:
            raise ConfigError("context and sequence parallelism split rows across ranks; not supported by qtarget yet")
        frozen: dict[str, Reference | FrozenHead | None] = {}
        for role, cache in self.caches.items():
            frozen[role] = pop_reference(inputs, role, cache.manifest.tail_policy)
            if role == "teacher" and self.vocab_rows:
                frozen[role] = truncate_reference(frozen[role], self.vocab_rows)  # pyright: ignore[reportArgumentType]
        extra = {name: inputs.pop(name, None) for name in ("labels", "row_ids", "loss_weights", "label_weights")}
        for role, (model, spec) in self.frozen_models.items():
            with self.accelerator.autocast():
                frozen[role] = live_head(model, spec, inputs, self.vocab_rows)
        if extra["loss_weights"] is not None and not self.target.has_label_term:
            raise ConfigError(
                f"the data has loss weights, but target {self.target.name!r} has no label term to weight; drop the weights"
            )
        step = TargetStep(
            self.target,
            extra["labels"],  # pyright: ignore[reportArgumentType]
            frozen,
            sequence_ids=extra["row_ids"],
            loss_weights=extra["loss_weights"],
            label_weights=extra["label_weights"],
            num_items=num_items,
            vocab_rows=self.vocab_rows,
            backend=self.args.loss_backend,  # pyright: ignore[reportAttributeAccessIssue]
        )
        return step, inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The target's loss over the whole optimizer batch's token count; one forward, no full logits."""
        step, model_inputs = self._step(dict(inputs), num_items_in_batch)
        output: TargetOutput = model(**model_inputs, target_loss=step)
        loss = output.loss
        assert loss is not None
        self._refuse_non_finite(loss, output, step)
        mode = "train" if self.model.training else "eval"  # pyright: ignore[reportOptionalMemberAccess]
        self._sums[mode].add(output, step.labels[:, 1:] != -100)
        if mode == "eval":
            self._samples.add(inputs["input_ids"], output, step)
        loss = loss.to(self.args.device)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients, num_items counts every rank's tokens
        return (loss, output) if return_outputs else loss

    def _refuse_non_finite(self, loss: Tensor, output: TargetOutput, step: TargetStep) -> None:
        if torch.isfinite(loss):
            return
        assert output.losses is not None and step.sequence_ids is not None
        bad = ~torch.isfinite(output.losses) | ~torch.isfinite(output.label_log_probs)  # pyright: ignore[reportArgumentType]
        rows = sorted({int(i) for i in step.sequence_ids[:, 1:][bad & (step.labels[:, 1:] != -100)]})
        reason = f"the loss is {loss.item()} at step {self.state.global_step}; rows {rows or 'unknown'} of the data"
        self._records.stopped(self.args, self.state, reason)
        raise NonFiniteLossError(
            f"{reason}; look at these rows, lower learning_rate, or set max_grad_norm; the last checkpoint is untouched"
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch; logits are never built."""
        if not prediction_loss_only:
            raise ConfigError(
                "compute_metrics needs full logits, which the target loss never builds; evaluate generations instead"
            )
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, self._prepare_inputs(inputs))
            return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the plain NLL and the weights' statistics, exact over the tokens since the last line."""
        mode = "train" if self.model.training else "eval"  # pyright: ignore[reportOptionalMemberAccess]
        prefix = evaluation_prefix(logs) if mode == "eval" else ""
        logs |= {f"{prefix}{key}": value for key, value in self._sums[mode].flush(self.accelerator).items()}
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            if folder.is_dir():
                (folder / COMPLETE_MARK).write_text("saved to the end\n")
            else:
                logger.warning(
                    f"{folder} is not kept: save_total_limit deleted it as the oldest, because {folder.parent} holds newer "
                    "checkpoints, or some of higher steps; move them away or choose another output_dir"
                )


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was saved to the end; one cut off by a kill is passed over."""
    found = [p.parent for p in Path(output_dir).glob(f"checkpoint-*/{COMPLETE_MARK}")]
    steps = [(int(p.name.rsplit("-", 1)[1]), p) for p in found if p.name.rsplit("-", 1)[1].isdigit()]
    return str(max(steps)[1]) if steps else None


def changed(args: Any, **values: Any) -> Any:
    """A shallow copy with some fields set (dataclasses.replace would run TrainingArguments' set-up again)."""
    changed = copy.copy(args)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def _gather_ragged(accelerator: Any, values: Tensor) -> Tensor:
    """Concatenate one-dimensional tensors of different lengths over all ranks, in rank order."""
    if accelerator.num_processes == 1:
        return values
    lengths = accelerator.gather(torch.tensor([len(values)], device=values.device))
    padded = torch.zeros(int(lengths.max()), dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    rows = accelerator.gather(padded[None])
    return torch.cat([row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)])


def _counts_before(accelerator: Any, count: int) -> int:
    """How many tokens the ranks before this one hold."""
    if accelerator.num_processes == 1:
        return 0
    counts = accelerator.gather(torch.tensor([count], device=accelerator.device))
    return int(counts[: accelerator.process_index].sum())
