"""``SFTTrainer`` with any target: TRL's data handling, PEFT, accelerate, checkpoints; our loss from hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.core.errors import ConfigError, DataError, NonFiniteLossError
from qtarget.core.shapes import Tensor
from qtarget.core.types import FrozenHead, Reference
from qtarget.data.loading import read_datasets
from qtarget.integrations.sft.batch_weights import Statistics, attach_label_weights, statistics_of_step
from qtarget.integrations.sft.collator import TargetCollator
from qtarget.integrations.sft.columns import TOKEN_COLUMNS
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.preparation import Preparation
from qtarget.integrations.shared.adapters import adapter_config, refuse_shared_weights, virtual_tokens
from qtarget.integrations.shared.checkpoints import COMPLETE_MARK
from qtarget.integrations.shared.frozen import check_caches, load_frozen, open_caches
from qtarget.integrations.shared.heads import add_target_head, backbone_states, probe_head, refuse_encoder_decoder
from qtarget.integrations.shared.live import LiveRecords, evaluation_prefix
from qtarget.integrations.shared.probes import refuse_leaks
from qtarget.integrations.shared.progress import TokenSums
from qtarget.integrations.shared.samples import RowSamples
from qtarget.integrations.shared.step import TargetOutput, TargetStep, live_head, pop_reference
from qtarget.integrations.shared.teacher import head_rows, truncate_reference, vocab_with_teacher
from qtarget.storage.models import check_finite, check_vocabulary, check_whole

logger = logging.get_logger(__name__)


def shared_rows_key(args: Any, eval_dataset: Any) -> str | None:
    """The setting that brings several documents into one row, if any does."""
    keys = ("packing", "padding_free", *(["eval_packing"] if eval_dataset is not None else []))
    return next((key for key in keys if getattr(args, key)), None)


class QTargetTrainer(SFTTrainer):
    """TRL's ``SFTTrainer`` with the loss of a target; arguments are TRL's.

    Args:
        model: a name, path or model, as in TRL.
        args: a ``QTargetConfig``.
        train_dataset, eval_dataset: as in TRL (``messages``, ``prompt`` + ``completion``, ``text`` or tokens), with an
            optional ``weight`` a row or a message, ``weight_spans`` in characters, or ``loss_weights`` a token.
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
            raise ConfigError(f"args is a {type(args).__name__}; expected qtarget.QTargetConfig")
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
        if kwargs.get("formatting_func") is None:
            train_dataset, eval_dataset = (
                read_datasets(d, args.dataset_text_field) for d in (train_dataset, eval_dataset)
            )
        self.target = args.build_target()
        given = {"reference": reference_model, "teacher": teacher_model}
        self.caches = open_caches(args, self.target, given)
        self._shared_rows = shared_rows_key(args, eval_dataset)
        self._refuse_models(model, args, kwargs.get("peft_config"), given)
        self.preparation = Preparation(self.target, self.caches)
        if isinstance(model, str):  # TRL loads it, and transformers fills what is missing at random
            check_whole("model", model, allow_new_weights=args.allow_new_weights, **(args.model_init_kwargs or {}))  # pyright: ignore[reportCallIssue]
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
        check_finite(base, "the model")
        check_vocabulary(base, self.processing_class, "the model")
        with self.accelerator.autocast():  # as in training: some attention kernels refuse float32
            self.head_spec = probe_head(base)
        add_target_head(base, self.head_spec)
        check_caches(args, self.caches, base)
        self.frozen_models = load_frozen(args, self.target, self.caches, given, base, self.accelerator)
        self._refuse_leaks(base)
        self.vocab_rows = None
        if "teacher" in self.caches or "teacher" in self.frozen_models:
            live = self.frozen_models.get("teacher")
            rows = head_rows(live[0]) if live else self.caches["teacher"].manifest.vocab_size
            self.vocab_rows = vocab_with_teacher(args, head_rows(base), rows, self.processing_class)
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        self._samples = RowSamples(args.heatmap_rows)
        self._records = LiveRecords(self._samples, self.preparation.descriptions, self.callback_handler.callbacks)
        self.callback_handler.callbacks.insert(0, self._records)  # before the trackers, see its docstring

    # -- set-up ---------------------------------------------------------------------------------------------

    def _refuse_models(self, model: Any, args: Any, peft_config: Any, given: dict[str, PreTrainedModel | None]) -> None:
        """What objects tell by themselves, before anything is tokenised."""
        refuse_encoder_decoder(model)
        for role, frozen in given.items():
            if frozen is not None and getattr(self.target.needs, role) and role not in self.caches:
                refuse_shared_weights(role, frozen, model)
        self._virtual_tokens = virtual_tokens(
            adapter_config(model, peft_config),
            shared_rows=self._shared_rows,
            gradient_checkpointing=args.gradient_checkpointing,
        )

    def _base_model(self) -> PreTrainedModel:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _refuse_leaks(self, base: PreTrainedModel) -> None:
        """Rows that share a batch row must not see one another, in the trained model and in the frozen ones."""
        args: Any = self.args
        key = self._shared_rows
        if key is None:
            return
        if args.packing and not self.padding_free:
            logger.warning(
                "packing_strategy 'wrapped' marks no ends: rows see the ones before them; 'bfd' keeps them apart"
            )
            return
        model: Any = self.model
        with self.accelerator.autocast():
            refuse_leaks(
                base,
                self.data_collator.of_documents,  # pyright: ignore[reportAttributeAccessIssue]
                lambda inputs: model(**inputs, target_loss=lambda hidden, *_: hidden),
                key,
                trained=True,
            )
            for frozen, _ in self.frozen_models.values():
                refuse_leaks(
                    frozen,
                    self.data_collator.of_documents,  # pyright: ignore[reportAttributeAccessIssue]
                    partial(backbone_states, frozen),
                    key,
                    trained=False,
                )

    def _collator(self) -> TargetCollator:
        theirs: Any = self.data_collator
        return TargetCollator(
            pad_token_id=theirs.pad_token_id,
            padding_free=theirs.padding_free,
            return_position_ids=theirs.return_position_ids,
            pad_to_multiple_of=theirs.pad_to_multiple_of,
            caches=self.caches,
            with_topk={role: "distribution" in getattr(self.target.needs, role) for role in self.caches},
            zero_masks=self.args.weights_scale == "all",  # pyright: ignore[reportAttributeAccessIssue]
        )

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's, around our columns and checks."""
        return self.preparation.prepare(
            dataset,
            dataset_name,
            trl=super()._prepare_dataset,
            args=args,
            tokenizer=processing_class,
            chat_template=self.chat_template,
            packing=packing,
            formatting_func=formatting_func,
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["input_ids", "labels", "seq_lengths", *TOKEN_COLUMNS]

    # -- one step -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """TRL's, plus the label weights of batch-scope targets over the whole optimizer batch and all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.target.scope == "batch" and batches and (len(batches) > 1 or self.accelerator.num_processes > 1):
            attach_label_weights(self.target, batches, self._statistics, self.accelerator)
        return batches, num_items

    def _statistics(self, batch: dict[str, Any]) -> Statistics:
        step, model_inputs = self._step(self._prepare_inputs(batch), None)
        return statistics_of_step(self.model_wrapped, model_inputs, step)

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
        step = TargetStep(
            self.target,
            extra["labels"],  # pyright: ignore[reportArgumentType]
            frozen,
            sequence_ids=extra["row_ids"],
            loss_weights=extra["loss_weights"],
            weights_scale=self.args.weights_scale,  # pyright: ignore[reportAttributeAccessIssue]
            label_weights=extra["label_weights"],
            num_items=num_items,
            vocab_rows=self.vocab_rows,
            backend=self.args.loss_backend,  # pyright: ignore[reportAttributeAccessIssue]
            virtual_tokens=self._virtual_tokens,
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
        raise NonFiniteLossError(f"{reason}; {_way_out(loss, output)}; the last checkpoint is untouched")

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


def _way_out(loss: Tensor, output: TargetOutput) -> str:
    """What to do about a loss that is no number: infinite for a reason, or diverged."""
    assert output.label_log_probs is not None
    excluded = int((output.label_log_probs == -torch.inf).sum())
    if excluded and loss == torch.inf:
        return (
            f"{excluded} of their labels have probability 0: the model's logit there is minus infinity (a banned or padded "
            "token); mask these labels, or train a target whose weight vanishes there (docs/loss.md, What infinite logits do)"
        )
    if loss == torch.inf:
        return (
            "the target pulls towards a token whose logit is minus infinity in the model (a banned or padded one), or away "
            "from one that the frozen model excludes (docs/loss.md, What infinite logits do)"
        )
    return "look at these rows, lower learning_rate, or set max_grad_norm"
