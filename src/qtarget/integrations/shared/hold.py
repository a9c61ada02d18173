"""A trainer that lets nobody else into its folder, goes on only from its own checkpoints, and saves all or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from qtarget.core.errors import ConfigError, ResumeError, UnsupportedModelError
from qtarget.integrations.shared.checkpoints import (
    STATE,
    check_checkpoint,
    last_complete_checkpoint,
    make_room,
    seal,
    step_of,
)
from qtarget.integrations.shared.records.live import plain
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.storage.files import TEMPORARY, digest, storage_errors
from qtarget.storage.folders import CACHE, MODEL, NAMES, RUN, is_inside, is_same, kind_of, make_folder, mark_folder
from qtarget.storage.locks import locked

logger = logging.get_logger(__name__)

SETTINGS = (
    "target", "target_kwargs", "guard", "group_by", "seed", "data_seed", "packing", "packing_strategy", "shuffle_dataset",
    "dataloader_drop_last", "optim", "optim_args", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "neftune_noise_alpha", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "world_size", "trust_region", "trust_region_kwargs", "target_weight", "anchor", "num_generations", "num_iterations",
    "steps_per_generation", "temperature", "max_completion_length", "scale_rewards", "advantage", "teacher_decay",
)  # fmt: skip
"""Fields of the config that decide what a run is; ``checkpoints.MAY_CHANGE`` of them may change on the way."""
SAVING = f"saving{TEMPORARY}"
WEIGHTS = ("model*.safetensors", "model*.index.json", "pytorch_model*", "adapter_model*")


class HeldTrainer(Trainer):
    """Mixed in before TRL's trainers, which have ``preparation``, ``caches`` and ``frozen_models`` when they train.

    The main process holds the lock of ``output_dir`` while it trains. A checkpoint says what it belongs to.
    """

    _belongs: dict[str, Any] | None = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, force_resume: bool = False, **kwargs: Any) -> Any:
        """Transformers' ``train``, behind checks.

        Args:
            resume_from_checkpoint: a folder, or True for the newest in ``output_dir`` that was saved to the end.
            force_resume: go on although the checkpoint is another run's, or without its optimizer or random state.

        Raises:
            ConfigError: another process writes ``output_dir``, or it is the model's folder or a cache.
            ResumeError: see ``check_checkpoint``; or True, and there is none.
            StorageError: the disk is full, or read-only.
        """
        output = Path(str(self.args.output_dir))
        with ExitStack() as stack:
            if self.args.process_index == 0:
                self._check_output(output)
                make_folder(output, "output_dir")
                stack.enter_context(locked(output, again=True))
                mark_folder(output, RUN)
            if self._belongs is None:  # before anything is loaded or trained
                self._belongs = run_fingerprint(self)
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(output)
                if resume_from_checkpoint is None:
                    raise ResumeError(
                        f"{output} holds no checkpoint that was saved to the end; leave resume_from_checkpoint out to "
                        "start anew"
                    )
            if resume_from_checkpoint:
                check_checkpoint(
                    resume_from_checkpoint,
                    self._belongs,
                    force=force_resume,
                    plain=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
                    rank=self.args.process_index if self.args.world_size > 1 else None,
                )
                if self._is_finished(Path(resume_from_checkpoint)):
                    return self._take_finished(Path(resume_from_checkpoint))
            return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Transformers', but for a tied head that the embeddings bring along: 5.23 would name it as missing."""
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = load_result.missing_keys
        kept = [name for name in missing if name not in tied or tied[name] in missing]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=kept))

    def _is_finished(self, checkpoint: Path) -> bool:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they load weights only where training begins
            return False
        return 0 < self.args.max_steps <= step_of(checkpoint)

    def _take_finished(self, checkpoint: Path) -> TrainOutput:
        """The model and state at the end of training; transformers 5.23 would take one step beyond ``max_steps``."""
        logger.warning(
            f"{checkpoint} is at step {step_of(checkpoint)} of {self.args.max_steps}: nothing is left to train"
        )
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _check_output(self, output: Path) -> None:
        caches: dict[str, Any] = getattr(self, "caches", {})
        model: Any = self.model
        for source in (getattr(model.config, "_name_or_path", None), *(cache.path for cache in caches.values())):
            if source and os.path.isdir(source) and (is_same(output, source) or is_inside(output, source)):
                raise ConfigError(
                    f"output_dir {output} is, or lies in, {source}, which is read here; choose another folder"
                )
        if output.is_dir() and (kind := kind_of(output)) in (CACHE, MODEL):
            raise ConfigError(
                f"output_dir {output} holds {NAMES[kind]}, and a training run would be written over it; choose another folder"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Transformers', and the mark last; one that cannot be written leaves nothing.

        Raises:
            StorageError: the disk is full, or read-only.
        """
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with storage_errors(folder):
            if self.args.should_save:
                make_room(folder)
            self.accelerator.wait_for_everyone()  # nobody writes into what is being cleared
            try:
                super()._save_checkpoint(model, trial)
            except Exception:
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)  # a full disk gets its space back
                raise
            self.accelerator.wait_for_everyone()  # every rank's part is there before the mark says so
            if not self.args.should_save:
                return
            if folder.is_dir():
                seal(folder, self._belongs or {})
            else:
                logger.warning(
                    f"{folder} is not kept: save_total_limit deleted it as the oldest, because {folder.parent} holds newer "
                    "checkpoints, or some of higher steps; move them away or choose another output_dir"
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Transformers', written beside and moved when it is whole; what a full disk cuts off replaces nothing.

        Raises:
            StorageError: the disk is full, or read-only.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if _internal_call or self.args.push_to_hub:
            super().save_model(output_dir, _internal_call)
            return
        beside = folder / SAVING
        with storage_errors(folder):
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            try:
                super().save_model(str(beside), True)
                self.accelerator.wait_for_everyone()
                if self.args.should_save and beside.is_dir():
                    move_all(beside, folder)
            except Exception:
                if self.args.should_save:
                    shutil.rmtree(beside, ignore_errors=True)
                raise


def move_all(source: Path, folder: Path) -> None:
    """Move what lies in ``source`` into ``folder``, in place of what has the same name there, and older weights' files."""
    new = {path.name for path in source.iterdir()}
    if any(Path(name).match(pattern) for name in new for pattern in WEIGHTS):
        for path in (path for pattern in WEIGHTS for path in folder.glob(pattern)):
            if path.name not in new and path.is_file():
                path.unlink()
    for path in source.iterdir():
        place = folder / path.name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(path, place)
    source.rmdir()


def run_fingerprint(trainer: Any) -> dict[str, Any]:
    """What a run is: target, model, rows, caches and the settings that decide its steps, as JSON holds them.

    Models under DeepSpeed ZeRO-3 are gathered, so every rank must call this.
    """
    args, base = trainer.args, trainer._base_model()
    found = {name: plain(getattr(args, name)) for name in SETTINGS if hasattr(args, name)}
    found["target_kwargs"] = found.get("target_kwargs") or {}
    for name in ("optim", "lr_scheduler_type"):
        found[name] = str(getattr(getattr(args, name, None), "value", getattr(args, name, None)))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    found |= {"rows a step": batch, "trained parameters": trained_parameters(trainer.model)}
    found |= model_entry("model", base)
    rows = trainer.preparation.descriptions.get("train")
    found |= {"rows": rows["fingerprint"], "number of rows": rows["rows"]} if rows else {}
    if (weights := row_weights(trainer.train_dataset)) is not None:
        found["row weights"] = weights
    for role, cache in trainer.caches.items():
        found[f"{role} cache"] = digest(repr(sorted((s.name, s.blake2b) for s in cache.manifest.shards)).encode())
    for role, (model, _) in trainer.frozen_models.items():
        found |= model_entry(f"{role} model", model)
    return found


def frozen_parts(trainer: Any) -> dict[str, dict[str, Any]]:
    """The frozen models of a run by role, as records name them: what they are, of which model, and a fingerprint."""
    found: dict[str, dict[str, Any]] = {}
    for role, cache in trainer.caches.items():
        manifest = cache.manifest
        prints = digest(repr(sorted((s.name, s.blake2b) for s in manifest.shards)).encode())
        what = f"a cache of {manifest.rows:,} rows, " + (f"top {manifest.top_k}" if manifest.top_k else "labels alone")
        found[role] = {"what": what, "model": Path(manifest.model_id).name, "fingerprint": prints}
    for role, (model, _) in trainer.frozen_models.items():
        name = Path(str(getattr(model.config, "_name_or_path", "") or type(model).__name__)).name
        found[role] = {"what": "run live", "model": name, "fingerprint": model_entry("it", model).get("it")}
    return found


def card_facts(trainer: Any, chats: bool) -> dict[str, Any]:
    """What a model card says beside the settings; known once training begins.

    Args:
        chats: whether the rows are messages.
    """
    known = {name: value for name, value in (trainer._belongs or {}).items() if name not in SETTINGS}
    return {"formula": trainer.target.formula, "paper": trainer.target.paper, "chats": chats,
            "frozen": frozen_parts(trainer), "fingerprints": known}  # fmt: skip


def model_entry(name: str, model: Any) -> dict[str, str]:
    """A model's fingerprint under its name; nothing where its weights are not here."""
    try:
        return {name: fingerprint_model(model)}
    except UnsupportedModelError:
        return {}


def trained_parameters(model: Any) -> str:
    """Digest of the names of the parameters that are trained: another adapter, or other frozen layers."""
    return digest("\n".join(sorted(name for name, p in model.named_parameters() if p.requires_grad)).encode())


def row_weights(dataset: Any) -> str | None:
    """Digest of the weights that rows bring along; None where they bring none."""
    if "loss_weights" not in (getattr(dataset, "column_names", None) or []):
        return None
    state = hashlib.blake2b(digest_size=16)
    for batch in dataset.select_columns(["loss_weights"]).with_format("arrow").iter(1000):
        values = batch["loss_weights"].combine_chunks().flatten()
        state.update(values.to_numpy(zero_copy_only=False).astype("<f4").tobytes())
    return state.hexdigest()
