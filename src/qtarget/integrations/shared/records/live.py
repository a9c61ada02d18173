"""A run as it goes: records in ``output_dir`` for ``qtarget report``, token pictures for whatever tracker there is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir
from transformers.utils import logging

import qtarget
from qtarget.integrations.shared.records.samples import RowSamples, with_text
from qtarget.report.heatmap import MEASURES, heatmap_image
from qtarget.report.runs.records import (
    LOG_FILE,
    ROLLOUTS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    SCHEMA_VERSION,
    append_line,
    read_lines,
    set_aside,
    write_lines,
)
from qtarget.scoring.cache.schema import fingerprint_tokenizer
from qtarget.storage.files import write_json, writing

logger = logging.get_logger(__name__)

PACKAGES = ("transformers", "trl", "datasets", "accelerate")
OTHER_TRACKERS = tuple(
    f"{name}Callback"
    for name in (
        "MLflow",
        "DagsHub",
        "Comet",
        "AzureML",
        "Neptune",
        "ClearML",
        "DVCLive",
        "SwanLab",
        "Trackio",
        "Flyte",
    )
)
"""Transformers' callbacks that get numbers, but no pictures, from here."""
NOT_RECORDED = ("hub_token", "output_dir", "logging_dir", "push_to_hub_token")


class LiveRecords(TrainerCallback):
    """Writes what ``qtarget.report.runs.records`` describes, on the main process; first among the callbacks, see below.

    Lines logged before training starts are held back until it does, so that evaluating a finished run changes nothing. A
    resumed run goes on in the same files, without the lines beyond its checkpoint, and in the same TensorBoard folder,
    which is why this callback must come before transformers' own. Lines that a run replaces are moved, never deleted.

    Args:
        data: description of each data set, by name (``describe_rows``).
        callbacks: the trainer's list of callbacks, where the trackers are looked for.
        more: what else the description holds, known when training begins.
    """

    def __init__(
        self,
        samples: RowSamples,
        data: dict[str, Any],
        callbacks: list[TrainerCallback],
        more: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._samples, self._data, self._callbacks, self._more = samples, data, callbacks, more
        self._held: dict[str, list[dict[str, Any]]] = {LOG_FILE: [], SAMPLES_FILE: []}
        self._training = False

    def on_train_begin(self, args: Any, state, control, **kwargs) -> None:
        """Start the files anew, or go on from the checkpoint that is resumed; what they held beyond is set aside."""
        if not state.is_world_process_zero:
            return
        output, step = Path(args.output_dir), state.global_step
        output.mkdir(parents=True, exist_ok=True)
        log, samples, rollouts = self._held[LOG_FILE], self._held[SAMPLES_FILE], []
        if step:
            rollouts = [line for line in read_lines(output / ROLLOUTS_FILE) if line["step"] <= step]
            log, before = state.log_history, read_lines(output / LOG_FILE)
            samples = [line for line in read_lines(output / SAMPLES_FILE) if line["step"] <= step]
            continue_tensorboard(self._callbacks, output, step)
        # the files are not a beginning of this log: lines beyond the checkpoint, or another run's
        if not step or before != log[: len(before)]:
            earlier = set_aside(output)
            if earlier is not None:
                logger.warning(f"{output} held records that this run does not go on with; they are in {earlier}")
        write_lines(output / LOG_FILE, log)
        write_lines(output / SAMPLES_FILE, samples)
        if rollouts:
            write_lines(output / ROLLOUTS_FILE, rollouts)
        write_json(output / RUN_FILE, self._description(args, state, kwargs["model"], kwargs["processing_class"]))
        self._held, self._training = {LOG_FILE: [], SAMPLES_FILE: []}, True

    def on_log(self, args: Any, state, control, logs=None, **kwargs) -> None:
        """One line more in the log."""
        if not state.is_world_process_zero:
            return
        self._write(args, LOG_FILE, {**(logs or {}), "step": state.global_step})
        for callback in tensorboards(self._callbacks):
            if callback.logging_dir is None:  # an evaluation before training would otherwise write to ./runs
                callback.logging_dir = str(Path(args.output_dir) / default_logdir())

    def on_evaluate(self, args: Any, state, control, metrics=None, **kwargs) -> None:
        """The sample rows of the evaluation that just ended, as a record and as pictures."""
        rows = self._samples.flush()
        if not rows or not state.is_world_process_zero:
            return
        rows, name = with_text(rows, kwargs["processing_class"]), evaluation_prefix(metrics or {}).rstrip("_")
        self._write(args, SAMPLES_FILE, {"step": state.global_step, "name": name, "rows": rows})
        send_pictures(self._callbacks, rows, name, state.global_step, Path(args.output_dir))

    def on_predict(self, args: Any, state, control, metrics, **kwargs) -> None:
        """Predictions are no evaluation of the run."""
        self._samples.flush()

    def rollouts(self, args: Any, state: Any, rows: list[dict[str, Any]]) -> None:
        """Samples that a run on its own samples keeps of a log line."""
        if state.is_world_process_zero and self._training:
            for row in rows:
                append_line(Path(args.output_dir) / ROLLOUTS_FILE, row)

    def stopped(self, args: Any, state: Any, reason: str) -> None:
        """Record why training is about to end with an error."""
        if state.is_world_process_zero and self._training:
            self._write(args, LOG_FILE, {"step": state.global_step, "stopped": reason})

    def _write(self, args: Any, name: str, line: dict[str, Any]) -> None:
        if self._training:
            append_line(Path(args.output_dir) / name, line)
        else:
            self._held[name].append(line)

    def _description(self, args: Any, state: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
        config = model.config
        return {
            "schema_version": SCHEMA_VERSION,
            "target": args.target_label,
            "target_kwargs": args.target_kwargs or {},
            "max_steps": state.max_steps,
            "model": {
                "name": str(getattr(config, "_name_or_path", "") or type(model).__name__),
                "type": config.model_type,
                "vocab_size": config.get_text_config().vocab_size,
                "tokenizer_fingerprint": fingerprint_tokenizer(tokenizer),
            },
            "data": self._data,
            **self._more(),
            "settings": {k: v for k, v in plain(args.to_dict()).items() if k not in NOT_RECORDED}
            | {
                name: getattr(args, name) for name in ("eos_token", "pad_token") if hasattr(args, name)
            },  # to_dict hides whatever ends in _token
            "versions": {"qtarget": qtarget.__version__, "torch": torch.__version__}
            | {name: version(name) for name in PACKAGES},
        }


def plain(value: Any) -> Any:
    """The value as far as JSON has a word for it; the rest as text."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def evaluation_prefix(metrics: dict[str, Any]) -> str:
    """``eval_``, or ``eval_NAME_`` of one among several evaluation sets, read off the metrics' names.

    Example:
        >>> evaluation_prefix({"eval_clean_loss": 1.0, "eval_clean_runtime": 2.0})
        'eval_clean_'
    """
    return next((key.removesuffix("runtime") for key in metrics if key.endswith("_runtime")), "eval_")


def tensorboards(callbacks: list[TrainerCallback]) -> list[Any]:
    """Transformers' TensorBoard callback, if the run has it."""
    return [callback for callback in callbacks if isinstance(callback, TensorBoardCallback)]


def continue_tensorboard(callbacks: list[TrainerCallback], output: Path, step: int) -> None:
    """Let a resumed run go on in its earlier TensorBoard folder; events beyond ``step`` are purged there."""
    for callback in tensorboards(callbacks):
        earlier = [path for path in output.glob("runs/**/events.out.tfevents.*") if path.is_file()]
        folder = callback.logging_dir or (max(earlier, key=lambda p: p.stat().st_mtime).parent if earlier else None)
        if folder is not None and callback.tb_writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            callback.logging_dir = str(folder)
            callback.tb_writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)


def send_pictures(
    callbacks: list[TrainerCallback], rows: list[dict[str, Any]], name: str, step: int, output: Path
) -> None:
    """Token pictures to TensorBoard and Weights & Biases; as files below ``output`` where another tracker is used.

    Args:
        name: ``eval``, or ``eval_NAME``.
    """
    trackers = {type(callback).__name__: callback for callback in callbacks}
    if not trackers.keys() & {"TensorBoardCallback", "WandbCallback", *OTHER_TRACKERS}:
        return
    title, group = f"{name}, step {step}", name.replace("eval_", "eval/", 1)
    pictures = {f"{group}/{key}": heatmap_image(rows, m, title) for key, m in MEASURES.items()}
    for callback in tensorboards(callbacks):
        for tag, picture in pictures.items():
            callback.tb_writer.add_image(tag, picture, step, dataformats="HWC")
        callback.tb_writer.flush()
    if "WandbCallback" in trackers:
        # transformers' callback has imported it, and has made ``train/global_step`` the axis of every metric
        wandb: Any = sys.modules["wandb"]
        images = {tag: wandb.Image(picture, caption=title) for tag, picture in pictures.items()}
        wandb.log({**images, "train/global_step": step})
    others = [k for k in trackers if k in OTHER_TRACKERS]
    if others:
        paths = [_save(picture, output / "token_pictures" / f"{tag.replace('/', '-')}-{step:06d}.png")
                 for tag, picture in pictures.items()]  # fmt: skip
        logger.info(f"{', '.join(others)} get no pictures from qtarget; they are {', '.join(map(str, paths))}")


def _save(picture: Any, path: Path) -> Path:
    from PIL import Image

    with writing(path) as file:
        Image.fromarray(picture).save(file, format="PNG")
    return path
