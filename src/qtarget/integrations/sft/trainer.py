"""``SFTTrainer`` with any target: TRL's data handling, PEFT, accelerate, checkpoints; our loss from hidden states."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from datasets import IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging
from trl.data_utils import is_conversational
from trl.trainer.sft_trainer import SFTTrainer

from qtarget.core.shapes import Tensor
from qtarget.data.limits import Limits
from qtarget.data.limits.templates import bounded_templates
from qtarget.integrations.sft.arguments import own_config, refuse_arguments, refuse_unmarked, text_datasets
from qtarget.integrations.sft.batch import split_batch
from qtarget.integrations.sft.batch_weights import Statistics, attach_label_weights, statistics_of_step
from qtarget.integrations.sft.config import QTargetConfig
from qtarget.integrations.sft.data.collator import TargetCollator
from qtarget.integrations.sft.data.columns import TOKEN_COLUMNS
from qtarget.integrations.sft.data.filtering import open_filter
from qtarget.integrations.sft.models import refuse_leaking_models, refuse_models, refuse_vision_model, shared_rows_key
from qtarget.integrations.sft.preparation import Preparation
from qtarget.integrations.sft.streams import stream_rows
from qtarget.integrations.shared.checkpoints import safe_checkpoint
from qtarget.integrations.shared.frozen import check_caches, load_frozen, open_caches, open_witness
from qtarget.integrations.shared.heads import add_target_head, probe_head
from qtarget.integrations.shared.hold import HeldTrainer, card_facts
from qtarget.integrations.shared.records.live import LiveRecords, evaluation_prefix
from qtarget.integrations.shared.records.progress import SeenTokens, TokenSums, counted_tokens
from qtarget.integrations.shared.records.samples import RowSamples
from qtarget.integrations.shared.records.terminal import print_short_lines
from qtarget.integrations.shared.records.watch import NotLearning
from qtarget.integrations.shared.saved.published import PublishedTrainer
from qtarget.integrations.shared.step import TargetOutput, TargetStep, non_finite
from qtarget.integrations.shared.teacher import head_rows, vocab_with_teacher
from qtarget.storage.models import check_finite, check_vocabulary, check_whole

logger = logging.get_logger(__name__)


class QTargetTrainer(HeldTrainer, PublishedTrainer, SFTTrainer):
    """TRL's ``SFTTrainer`` with the loss of a target; the arguments and their order are TRL's.

    Everything that can be refused is refused before the first row is tokenised.

    Args:
        model: a name, path or model, as in TRL.
        args: a ``QTargetConfig``; TRL's ``SFTConfig`` or ``TrainingArguments`` train with ``target="sft"``.
        data_collator, compute_loss_func: refused, they would bypass the target.
        train_dataset, eval_dataset: as in TRL (``messages``, ``prompt`` + ``completion``, ``text`` or tokens; whole or
            streamed), with an optional ``weight`` a row or a message, ``weight_spans`` in characters, or
            ``loss_weights`` a token.
        reference_model, teacher_model: frozen models run live, where the target needs one and no cache is given.

    Raises:
        MissingStatisticError: the target needs a frozen model and none is given.
        CacheMismatchError: the cache was made from other rows, another model, tokenizer or chat template.
        DataError: nothing to train on, or images.
        ConfigError: an argument or setting that a target cannot honour.
        UnsupportedModelError: a head that the loss cannot rebuild.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "sft", "qtarget"]
    _rows_are: ClassVar[str] = "train"

    def __init__(
        self,
        model: Any,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Any = None,
        *,
        reference_model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
    ) -> None:
        settings = own_config(args, model)
        refuse_arguments(settings, data_collator, compute_loss_func, processing_class)
        self.target = settings.build_target()
        given = {"reference": reference_model, "teacher": teacher_model}
        self.caches = open_caches(settings, self.target, given)
        self._row_filter = open_filter(settings, self.caches, train_dataset)
        witness = open_witness(settings.witness, self.target, settings.cache_verify_key)
        self.preparation = Preparation(self.target, self.caches, self._row_filter, witness, settings.group_by)
        self._may_prepare = False
        self._shared_rows = shared_rows_key(settings, eval_dataset)
        read: Any = {
            role: m
            for role, m in given.items()
            if m is not None and getattr(self.target.needs, role) and role not in self.caches
        }
        self._virtual_tokens = refuse_models(model, settings, peft_config, read, self._shared_rows)
        train_dataset, eval_dataset = text_datasets(
            settings, train_dataset, eval_dataset, bool(self.caches), self._rows_are
        )
        self.preparation.compare(train_dataset, eval_dataset, settings.dataset_text_field)
        if formatting_func is None:  # which reads the user's own columns
            train_dataset = self.preparation.adopt(train_dataset, self._rows_are, settings.dataset_text_field)
            eval_dataset = self.preparation.adopt(eval_dataset, "eval", settings.dataset_text_field)
            refuse_unmarked(settings, train_dataset)
        if isinstance(model, str):  # TRL loads it, and transformers fills what is missing at random
            options: Any = settings.model_init_kwargs or {}
            check_whole("model", model, allow_new_weights=settings.allow_new_weights, **options)
        with bounded_templates(Limits.of(settings.limits).template_seconds):  # TRL renders one row to look at
            super().__init__(
                model=model,
                args=settings,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=peft_config,
                formatting_func=formatting_func,
            )
        self._chats = is_conversational(next(iter(self.train_dataset)))  # pyright: ignore[reportArgumentType]
        # compute_loss divides by num_items_in_batch whatever the model's forward takes
        self.model_accepts_loss_kwargs = True
        self.data_collator = TargetCollator.instead_of(
            self.data_collator, self.caches, self.target, zero_masks=settings.weights_scale == "all"
        )
        self._set_up_models(settings, given)
        self._set_up_records(settings)
        self._may_prepare = True
        self._prepare_datasets()
        base = self._base_model()
        stream = isinstance(self.train_dataset, IterableDataset)
        self.preparation.meet(
            base,
            self.processing_class,
            frozen={role: model for role, (model, _) in self.frozen_models.items()},
            saves_model=base is self.model,
            chat_stream=stream and self._chats,
        )

    # -- set-up ---------------------------------------------------------------------------------------------

    def _set_up_models(self, args: QTargetConfig, given: dict[str, PreTrainedModel | None]) -> None:
        """Give the model its head, and find the frozen ones."""
        base = self._base_model()
        refuse_vision_model(base, self._is_vlm)
        check_finite(base, "the model")
        check_vocabulary(base, self.processing_class, "the model")
        with self.accelerator.autocast():  # as in training: some attention kernels refuse float32
            self.head_spec = probe_head(base)
        add_target_head(base, self.head_spec)
        filtering = {} if self._row_filter is None else {"reference": self._row_filter.cache}
        check_caches(args, {**filtering, **self.caches}, base)
        self.frozen_models = load_frozen(args, self.target, self.caches, given, base, self.accelerator)
        frozen = [model for model, _ in self.frozen_models.values()]
        wrapped = args.packing and not self.padding_free
        with self.accelerator.autocast():
            refuse_leaking_models(self.model, base, frozen, self.data_collator, self._shared_rows, wrapped)
        self.vocab_rows = None
        if "teacher" in self.caches or "teacher" in self.frozen_models:
            live = self.frozen_models.get("teacher")
            rows = head_rows(live[0]) if live else self.caches["teacher"].manifest.vocab_size
            self.vocab_rows = vocab_with_teacher(args, head_rows(base), rows, self.processing_class)

    def _set_up_records(self, args: QTargetConfig) -> None:
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        self._samples = RowSamples(args.heatmap_rows)
        callbacks = self.callback_handler.callbacks
        self._records = LiveRecords(self._samples, self.preparation.descriptions, callbacks, self._card_facts)
        callbacks.insert(0, self._records)  # before the trackers, see its docstring
        self.add_callback(SeenTokens())
        self.watch = NotLearning(args.target_label, args.guard)
        self.add_callback(self.watch)
        print_short_lines(self)

    def _card_facts(self) -> dict[str, Any]:
        """What a model card says beside the settings."""
        return card_facts(self, self._chats)

    def _base_model(self) -> PreTrainedModel:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _prepare_datasets(self) -> None:
        """What TRL does in its constructor, once nothing is left to refuse."""
        args: Any = self.args
        tokenizer: Any = self.processing_class
        eval_packing = args.packing if args.eval_packing is None else args.eval_packing

        def prepared(dataset: Any, packing: bool, name: str) -> Any:
            return self._prepare_dataset(dataset, tokenizer, args, packing, self._formatting_func, name)

        self.train_dataset = prepared(self.train_dataset, args.packing, self._rows_are)
        evals: Any = self.eval_dataset
        if isinstance(evals, dict):
            self.eval_dataset = {name: prepared(dataset, eval_packing, name) for name, dataset in evals.items()}
        elif evals is not None:
            self.eval_dataset = prepared(evals, eval_packing, "eval")

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's, around our columns and checks; nothing yet while TRL's constructor runs."""
        if not self._may_prepare:
            return dataset
        prepare: Any = stream_rows if isinstance(dataset, IterableDataset) else self.preparation.prepare
        return prepare(
            dataset,
            dataset_name,
            trl=super()._prepare_dataset,
            args=args,
            tokenizer=processing_class,
            chat_template=self.chat_template,
            packing=packing,
            formatting_func=formatting_func,
            completion_only=self.completion_only_loss,
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
        return split_batch(
            inputs,
            self.target,
            self.caches,
            self.frozen_models,
            num_items=num_items,
            vocab_rows=self.vocab_rows,
            backend=self.args.loss_backend,  # pyright: ignore[reportAttributeAccessIssue]
            weights_scale=self.args.weights_scale,  # pyright: ignore[reportAttributeAccessIssue]
            autocast=self.accelerator.autocast,  # pyright: ignore[reportArgumentType]
            virtual_tokens=self._virtual_tokens,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The target's loss over the whole optimizer batch's token count; logits only where ``return_outputs`` asks."""
        step, model_inputs = self._step(dict(inputs), num_items_in_batch)
        output: TargetOutput = model(**model_inputs, target_loss=step)
        loss = self._objective(output, num_items_in_batch)
        if not torch.isfinite(loss):
            kept = safe_checkpoint(str(self.args.output_dir))
            error = non_finite(float(loss), output, step, self.state.global_step, kept)
            self._records.stopped(self.args, self.state, str(error).partition(";")[0])
            raise error
        mask = step.labels[:, 1:] != -100
        if self.model.training:  # pyright: ignore[reportOptionalMemberAccess]
            self._sums["train"].add(output, mask)
            self._seen.add(inputs)
        else:
            counted = counted_tokens(self.accelerator, len(mask), inputs.get("example_ids"))
            self._sums["eval"].add(output, mask, counted)
            self._samples.add(inputs["input_ids"], output, step)
        if not return_outputs:
            return loss
        with torch.no_grad():  # as in TRL: the model's own forward, whose logits the loss never builds
            return loss, model(**model_inputs, use_cache=False)

    def _objective(self, output: TargetOutput, num_items_in_batch: Any) -> Tensor:
        """The loss scaled as the gradients need it, with the router loss of a mixture of experts as TRL adds it."""
        assert output.loss is not None
        loss = output.loss.to(self.args.device)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # DDP averages gradients, num_items counts every rank's tokens
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if output.aux_loss is None:
            return loss
        # a mean over each micro-batch, so it is averaged over them; the target's loss is a sum over all
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return loss + self.router_aux_loss_coef * output.aux_loss.to(loss.device) / steps

    # -- what is logged -------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, without what an earlier prediction left in the statistics."""
        self._sums["eval"].clear()
        self._samples.flush()
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the plain NLL and the weights' statistics, exact over the tokens since the last line."""
        mode = "train" if self.model.training else "eval"  # pyright: ignore[reportOptionalMemberAccess]
        prefix = evaluation_prefix(logs) if mode == "eval" else ""
        found = self._sums[mode].flush(self.accelerator)
        if found:
            found["num_tokens"] = self._seen.settle(self.accelerator, self._tp_size or 1)
        logs |= {f"{prefix}{key}": value for key, value in found.items()}
        super().log(logs, start_time)

    @property
    def _seen(self) -> SeenTokens:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, SeenTokens))

    def _save_checkpoint(self, model, trial) -> None:
        """TRL's, with the tokens of all ranks in the state that it saves."""
        self._seen.settle(self.accelerator, self._tp_size or 1)
        super()._save_checkpoint(model, trial)
