"""``GRPOTrainer`` with trust regions and targets: TRL's sampling, rewards, tools, PEFT and accelerate; our loss."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from qtarget.core.errors import (
    ConfigError,
    NonFiniteLossError,
    RewardError,
    ScoringServerError,
    UnsupportedModelError,
)
from qtarget.core.shapes import Tensor
from qtarget.core.statistics import token_statistics
from qtarget.core.types import FrozenHead, Reference
from qtarget.integrations.rl.batch import Samples, reduced, samples_of
from qtarget.integrations.rl.checks import own_config, refuse_missing, rewards_of
from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.differing import NoDifference, newest
from qtarget.integrations.rl.inputs.prompts import Prompts, check_prompts, describe_prompts
from qtarget.integrations.rl.listed import listed_outcomes, reads_outcomes, refuse_told
from qtarget.integrations.rl.refusals import TAUGHT, refuse_truncated_sampling
from qtarget.integrations.rl.rollouts import REWARDS, own_rewards, rollout_rows
from qtarget.integrations.rl.served import ServedTeacher, reference_of
from qtarget.integrations.rl.start import TEACHER, BesideStart, is_logged, start_of
from qtarget.integrations.rl.sums import PolicySums
from qtarget.integrations.rl.teachers import (
    BASE,
    EMA,
    PROMPT_KEYS,
    SELF,
    SlowTeacher,
    as_it_was,
    behind_policys_prompt,
    teacher_inputs,
    teacher_prompts,
)
from qtarget.integrations.shared.checkpoints import safe_checkpoint
from qtarget.integrations.shared.frozen import load_frozen
from qtarget.integrations.shared.heads import HeadSpec, add_target_head, probe_head, refuse_encoder_decoder
from qtarget.integrations.shared.hold import HeldTrainer, card_facts
from qtarget.integrations.shared.records.live import LiveRecords
from qtarget.integrations.shared.records.samples import RowSamples
from qtarget.integrations.shared.records.terminal import print_short_lines
from qtarget.integrations.shared.saved.published import PublishedTrainer
from qtarget.integrations.shared.step import TargetOutput, TargetStep, live_head
from qtarget.integrations.shared.teacher import head_rows, is_url, vocab_with_teacher
from qtarget.integrations.shared.warned import hush_old_names
from qtarget.storage.models import check_finite, check_whole

logger = logging.get_logger(__name__)


class QTargetGRPOTrainer(HeldTrainer, PublishedTrainer, GRPOTrainer):
    """TRL's ``GRPOTrainer`` with a trust region, a target, or both; the arguments and their order are TRL's.

    One method of TRL is replaced (``_compute_loss``), three are wrapped. Everything that can be refused is refused before the
    first sample is drawn.

    Args:
        model: a name, path or model, as in TRL.
        reward_funcs: as in TRL; none where a target alone teaches (``trust_region=None``).
        args: a ``QTargetGRPOConfig``.
        reference_model, teacher_model: frozen models, where the target needs one and none is named.

    Raises:
        ConfigError: an argument or setting that cannot be honoured.
        DataError: no prompts, or a reward asks for a column that the rows do not have.
        RewardError: a reward function raised, or returned what is no reward.
        UnsupportedModelError: a head that the loss cannot rebuild, a vision model, a mixture of experts.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "qtarget"]
    _slow: SlowTeacher | None = None
    _served: ServedTeacher | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        reference_model: PreTrainedModel | None = None,
        teacher_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        settings = own_config(args)
        self.target = settings.build_target()
        given = {"reference": reference_model, "teacher": teacher_model}
        refuse_missing(settings, self.target, given)
        refuse_encoder_decoder(model)
        environments = kwargs.get("environment_factory") is not None
        check_prompts(train_dataset, eval_dataset, environments)
        rewards = rewards_of(settings, reward_funcs, train_dataset, environments)
        told = settings.use_vllm or kwargs.get("rollout_func") is not None
        if settings.anchor != "old" and told:
            refuse_truncated_sampling(settings)
        refuse_told(settings, self.target, told)
        if isinstance(model, str):  # TRL loads it, and transformers fills what is missing at random
            options: Any = settings.model_init_kwargs or {}
            check_whole("model", model, allow_new_weights=settings.allow_new_weights, **options)
        super().__init__(model, rewards, settings, train_dataset, eval_dataset, *positional, **kwargs)
        hush_old_names()
        self._sums = {"train": PolicySums(), "eval": PolicySums()}
        self._sampled_at = 0
        self._rollouts: list[dict[str, Any]] = []
        self.caches: dict[str, Any] = {}
        self.preparation = Prompts({} if train_dataset is None else {"train": describe_prompts(train_dataset)})
        callbacks = self.callback_handler.callbacks
        self._records = LiveRecords(RowSamples(0), self.preparation.descriptions, callbacks, self._card_facts)
        callbacks.insert(0, self._records)  # before the trackers, see its docstring
        self.watch = NoDifference(taught=settings.target is not None)
        self.add_callback(self.watch)
        print_short_lines(self)
        with torch.random.fork_rng():  # TRL has seeded the sampler; probes draw tokens too
            self._set_up_models(settings, given)
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            self._start = None if sharded else start_of(settings, self.model, model if isinstance(model, str) else None)

    def _set_up_models(self, args: QTargetGRPOConfig, given: dict[str, PreTrainedModel | None]) -> None:
        """Give the model its head, and find the frozen ones; all heads at the sampler's temperature."""
        if self._is_vlm or self.aux_loss_enabled:
            experts = "is a mixture of experts, whose sampler routes on its own"
            what = "reads images or sound" if self._is_vlm else experts
            raise UnsupportedModelError(f"the model {what}; expected a dense text model, or use TRL's GRPOTrainer")
        base = self._base_model()
        check_finite(base, "the model")
        with self.accelerator.autocast():  # as in training: some attention kernels refuse float32
            spec = probe_head(base)
        add_target_head(base, at_temperature(spec, self.temperature))
        if reads_outcomes(self.target) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(
                "outcomes: listed asks the policy once more when it samples, which FSDP and DeepSpeed do not gather it for; set "
                "outcomes: binary, or train with DDP"
            )
        self._spec = spec
        self.frozen_models = load_frozen(args, self.target, {}, given, base, self.accelerator)
        if is_url(args.teacher):
            self._served = ServedTeacher(str(args.teacher), base, self._tokenizer, args.teacher_top_k)
        elif args.teacher == EMA:
            self._follow(base, spec)
        elif args.teacher is not None:
            own = args.teacher == SELF or hasattr(self.model, "disable_adapter")
            self.frozen_models["teacher"] = (base if own else as_it_was(base), spec)
        self.vocab_rows = None
        if (live := self.frozen_models.get("teacher")) is not None:
            self.vocab_rows = vocab_with_teacher(args, head_rows(base), head_rows(live[0]), self._tokenizer)

    def _follow(self, base: PreTrainedModel, spec: HeadSpec) -> None:
        """Let a slow teacher follow the policy."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "teacher: ema keeps a mean of whole parameters, and FSDP and DeepSpeed split them; set teacher: base, or train "
                "with DDP"
            )
        self._slow = SlowTeacher(base, self.args.teacher_decay)  # pyright: ignore[reportAttributeAccessIssue]
        self.add_callback(self._slow)
        self.frozen_models["teacher"] = (self._slow.model, spec)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Transformers', and the slow teacher beside it."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._slow is not None and self.args.should_save:
            self._slow.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """TRL's, and the slow teacher as it was."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._slow is not None and checkpoint is not None:
            self._slow.load(Path(checkpoint))

    def _card_facts(self) -> dict[str, Any]:
        """What a model card says beside the settings."""
        args, row = self.args, next(iter(self.train_dataset or []), {})
        facts = card_facts(self, isinstance(row.get("prompt"), list))  # pyright: ignore[reportAttributeAccessIssue]
        if self._served is not None:
            facts["frozen"]["teacher"] = {"what": "behind a URL"}
        return facts | {"rewards": list(self.reward_func_names) if args.rewarded else []}  # pyright: ignore[reportAttributeAccessIssue]

    def _base_model(self) -> PreTrainedModel:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # -- one step -------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's; remembers at which step the samples were drawn, and adds what a privileged teacher sees."""
        if self.model.training:  # pyright: ignore[reportOptionalMemberAccess]
            self._sampled_at = self.state.global_step
        args: Any = self.args
        try:
            output = super()._generate_and_score_completions(inputs)
        except RewardError as error:
            self._records.stopped(args, self.state, str(error).partition(";")[0])
            raise RewardError(f"{error}{safe_checkpoint(args.output_dir)}") from error
        if args.rewarded:
            here, names = self.accelerator, self.reward_func_names
            found = own_rewards(self._logs["rewards"], names, len(inputs), here.process_index, here.num_processes)
            if self.model.training:  # pyright: ignore[reportOptionalMemberAccess]
                self.watch.saw(*newest(self._logs, names, len(inputs) * here.num_processes), args.num_generations)
            output[REWARDS] = found.to(output["prompt_ids"].device)
        if (
            reads_outcomes(self.target) and "old_per_token_logps" in output
        ):  # else it is the live model, and nothing has moved
            output |= self._listed(output)
        if args.privileged_column is not None:
            output |= self._privileged(inputs, output)
        if self._served is not None:
            try:
                output |= self._asked(output)
            except ScoringServerError as error:
                self._records.stopped(args, self.state, str(error).partition(";")[0])
                raise
        return output

    def _asked(self, output: dict[str, Any]) -> dict[str, Tensor]:
        """What the teacher behind a URL says of samples that were just drawn."""
        assert self._served is not None
        prompt = PROMPT_KEYS if PROMPT_KEYS[0] in output else ("prompt_ids", "prompt_mask")
        seen, said = ((output[a], output[b]) for a, b in (prompt, ("completion_ids", "completion_mask")))
        return self._served.about(seen, said)

    def _privileged(self, inputs: Any, output: dict[str, Any]) -> dict[str, Tensor]:
        args: Any = self.args
        # still in the order of ``inputs``: TRL 1.16 shuffles what this returns
        tokenizer: Any = self._tokenizer
        return teacher_prompts(
            inputs,
            args.privileged_column,
            args.privileged_template,
            self._tokenize_prompts,
            tokenizer.pad_token_id,
            output["prompt_ids"].device,
        )

    def _listed(self, output: dict[str, Any]) -> dict[str, Tensor]:
        args: Any = self.args
        spec, rows = at_temperature(self._spec, self.temperature), args.per_device_train_batch_size
        with self.accelerator.autocast():
            return listed_outcomes(output, self._base_model(), spec, args.listed_outcomes, rows, self.vocab_rows)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """In place of TRL 1.16's: the loss of the target over the completions, averaged as TRL averages."""
        args: Any = self.args
        training = self.model.training  # pyright: ignore[reportOptionalMemberAccess]
        accumulation = self.current_gradient_accumulation_steps if training else 1
        regional = self.target.needs.advantages
        drawn = samples_of(inputs, args.anchor, ratios=regional, skip_without_signal=args.skip_without_signal)
        samples, divide_by = reduced(
            drawn,
            args.loss_type,
            num_items=inputs["num_items_in_batch"],
            processes=self.accelerator.num_processes,
            accumulation=accumulation,
            share=accumulation / args.steps_per_generation if training else 1.0,
            horizon=args.max_completion_length,
        )
        frozen = {role: self._frozen(role, samples, inputs) for role in self.frozen_models}
        step = self._step_of(samples, divide_by, inputs, frozen)
        start = self._start_head(samples, frozen)
        asked = step if start is None else BesideStart(step, start)
        output: TargetOutput = model(input_ids=samples.ids, attention_mask=samples.attention_mask, target_loss=asked)
        assert output.loss is not None
        if not torch.isfinite(output.loss):
            reason = f"the loss is {float(output.loss)} at step {self.state.global_step}"
            self._records.stopped(self.args, self.state, reason)
            raise NonFiniteLossError(
                f"{reason}; lower learning_rate, set max_grad_norm, or look at the samples (log_completions: "
                f"true){safe_checkpoint(args.output_dir)}"
            )
        taught = gained(samples, step.frozen["teacher"], output) if args.advantage == TAUGHT else None
        advantages, given = (drawn.advantages, samples.advantages) if taught is None else (taught, taught)
        sums = self._sums["train" if training else "eval"]
        sums.add(output, samples, given)
        if isinstance(asked, BesideStart) and asked.kl is not None:
            sums.add_start(asked.kl, step.labels)
        if training:
            self._keep(inputs, samples, output, advantages, given)
        return output.loss.to(self.accelerator.device)

    def _keep(
        self, inputs: dict[str, Any], samples: Samples, output: TargetOutput, advantages: Tensor, given: Tensor
    ) -> None:
        """Samples of this step for the records, until the log line has as many as are asked."""
        args: Any = self.args
        missing = args.kept_samples - len(self._rollouts)
        if missing < 1 or not self.accelerator.is_main_process:
            return
        names = self.reward_func_names if args.rewarded else ()
        rows = rollout_rows(inputs, samples, output, advantages, given, self._tokenizer, names, missing)
        step = self.state.global_step
        self._rollouts += [{"step": step + 1, "age": max(step - self._sampled_at, 0), **row} for row in rows]

    def _frozen(self, role: str, samples: Samples, inputs: dict[str, Any]) -> FrozenHead:
        """What a frozen model says of the completions; a privileged teacher reads another prompt before them."""
        args: Any = self.args
        privileged = role == "teacher" and args.privileged_column is not None
        seen = teacher_inputs(inputs) if privileged else {
            "input_ids": samples.ids, "attention_mask": samples.attention_mask,
        }  # fmt: skip
        model, spec = self.frozen_models[role]
        policy: Any = self.accelerator.unwrap_model(self.model)
        base = role == "teacher" and args.teacher == BASE and hasattr(policy, "disable_adapter")
        with self.accelerator.autocast(), policy.disable_adapter() if base else nullcontext():
            head = live_head(model, at_temperature(spec, self.temperature), seen, self.vocab_rows)
        if not privileged:
            return head
        return behind_policys_prompt(head, inputs[PROMPT_KEYS[0]].shape[1], inputs["prompt_ids"].shape[1])

    def _start_head(self, samples: Samples, frozen: dict[str, Any]) -> FrozenHead | None:
        """What the start says of the completions, on steps that are logged; it is at hand, or not measured."""
        training = self.model.training  # pyright: ignore[reportOptionalMemberAccess]
        if self._start is None or (training and not is_logged(self.args, self.state)):
            return None
        if self._start == TEACHER:
            return frozen["teacher"]
        policy: Any = self.accelerator.unwrap_model(self.model)
        seen = {"input_ids": samples.ids, "attention_mask": samples.attention_mask}
        with self.accelerator.autocast(), policy.disable_adapter():
            return live_head(self._base_model(), at_temperature(self._spec, self.temperature), seen, self.vocab_rows)

    def _step_of(
        self, samples: Samples, divide_by: Tensor, inputs: dict[str, Any], heads: dict[str, FrozenHead]
    ) -> TargetStep:
        frozen: dict[str, Reference | FrozenHead | None] = {**heads}
        if self._served is not None:
            frozen["teacher"] = reference_of(inputs)
        if self.args.advantage == TAUGHT:  # pyright: ignore[reportAttributeAccessIssue]
            frozen["teacher"] = at_samples(frozen["teacher"], samples.labels)
        regional = self.target.needs.advantages
        return TargetStep(
            target=self.target,
            labels=samples.labels,
            frozen=frozen,
            advantages=samples.advantages if regional else None,
            rollout=samples.rollout() if regional else None,
            num_items=divide_by,
            vocab_rows=self.vocab_rows,
            backend=self.args.loss_backend,  # pyright: ignore[reportAttributeAccessIssue]
        )

    # -- what is logged -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with what the trust region did; exact over tokens and ranks since the last line."""
        mode = "train" if self.model.training else "eval"  # pyright: ignore[reportOptionalMemberAccess]
        found = self._sums[mode].flush(self.accelerator, ratios=self.target.needs.advantages)
        if found and mode == "train":
            found["rollout/age"] = float(max(self.state.global_step - 1 - self._sampled_at, 0))
        prefix = "eval_" if mode == "eval" else ""
        logs |= {f"{prefix}{key}": value for key, value in found.items()}
        if not self.args.rewarded:  # pyright: ignore[reportAttributeAccessIssue]
            for key in [key for key in self._metrics[mode] if "reward" in key]:
                del self._metrics[mode][key]  # of the stand-in
        super().log(logs, start_time)
        if mode == "train":
            self._records.rollouts(self.args, self.state, self._rollouts)
            self._rollouts = []


def at_temperature(spec: HeadSpec, temperature: float) -> HeadSpec:
    """The head whose softmax the sampler drew from: ``softcap(scale z) / T``.

    Example:
        >>> at_temperature(HeadSpec(1.0, 30.0), 2.0)
        HeadSpec(scale=0.5, softcap=15.0)
    """
    return HeadSpec(spec.scale / temperature, None if spec.softcap is None else spec.softcap / temperature)


def at_samples(teacher: Any, labels: Tensor) -> Reference:
    """What a frozen head says of the sampled tokens alone, a chunk of logits at a time; 0 where nothing is trained on.

    A server has said so already.
    """
    if isinstance(teacher, Reference):
        return Reference(label_log_probs=teacher.label_log_probs)
    said = token_statistics(
        hidden=teacher.hidden[:, :-1], labels=labels[:, 1:], lm_head_weight=teacher.lm_head_weight, bias=teacher.bias,
        logit_scale=teacher.logit_scale, logit_softcap=teacher.logit_softcap,
    )  # fmt: skip
    assert said.label_log_probs is not None
    return Reference(label_log_probs=torch.nn.functional.pad(said.label_log_probs, (1, 0)))


def gained(samples: Samples, teacher: Any, output: TargetOutput) -> Tensor:
    """``[batch, time]`` the advantages that ``Taught`` made of the teacher's log-probs, unshifted."""
    assert output.label_log_probs is not None
    return samples.advantages + teacher.label_log_probs - torch.nn.functional.pad(output.label_log_probs, (1, 0))
