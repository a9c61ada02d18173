"""``qtarget train``: fine-tune with a target, on TRL."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.cli.options.settings import RL, check_algorithm
from qtarget.cli.options.started import (
    SUMMARY_FILE,
    after_training,
    how_to_go_on,
    saved_model,
    starting_point,
    write_records,
)
from qtarget.report.runs.records import CONFIG_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qtarget.cli.options.config import RunConfig
    from qtarget.cli.options.frozen import Rows

TEACHER_CACHE = "teacher_cache"
"""Folder under ``output_dir`` for what a teacher behind a URL said."""
TEACHER_URL = "teacher_url"
"""File in it, written when all is said: the URL."""

logger = logging.getLogger(__name__)


def train(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="Keys of TRL's SFTConfig and ModelConfig, and qtarget's.")
    ],
) -> None:
    """Fine-tune: any key of CONFIG.yaml can be overridden by `--key value`.

    With `algorithm: rl` this is `qtarget rl`.
    """
    from qtarget.cli.options.config import load_config
    from qtarget.cli.options.early import check_config
    from qtarget.cli.options.settings import read_settings
    from qtarget.command import remember

    if check_algorithm(read_settings(config, context.args)) == RL:
        from qtarget.cli.rl import rl

        rl(context, config)
        return
    check_config(config, context.args)
    remember(config, context.args)
    run_training(load_config(config, context.args), beside=[config])


def run_training(config: RunConfig, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Train, save model, tokenizer, config and summary into ``output_dir``.

    Args:
        beside: files that may lie in ``output_dir`` already, as the config.

    Returns:
        The summary.

    Raises:
        ConfigError: the output folder holds an earlier run and ``resume`` is not set, is somebody else's, or another
            process writes there.
        ResumeError: the checkpoint is damaged or of another run.
        ScoringServerError: the teacher is a URL, and its server fails or is not what it should be.
    """
    from qtarget.cli.filtered import refuse_weighed
    from qtarget.cli.options.interrupts import on_interrupt
    from qtarget.filtering.decision import Filter
    from qtarget.storage.folders import RUN, owned

    refuse_weighed(config, Filter.of(config.training.filter))
    training, read = config.training, [*config.inputs, config.data.dataset_name]
    with ExitStack() as stack:
        if training.process_index == 0:
            output = str(training.output_dir)
            stack.enter_context(owned(output, RUN, option="output_dir", inputs=read, beside=beside))
        stack.enter_context(on_interrupt(lambda: how_to_go_on(Path(str(training.output_dir)))))
        return train_and_save(config)


def train_and_save(config: RunConfig) -> dict[str, Any]:
    """``run_training`` in a folder that is ours."""
    from qtarget.cli.missing import score_missing
    from qtarget.cli.options.datasets import load_datasets

    # first: it refuses a folder in use before a server is asked or rows are read
    checkpoint = starting_point(config)
    if config.training.teacher_url is not None:
        score_teacher(config)
    train_rows, validation_rows = load_datasets(config, overlap=False)
    score_missing(config, (train_rows, validation_rows))
    trainer = build_trainer(config, train_rows, validation_rows)
    say_advice(trainer, config, (train_rows, validation_rows))
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint, force_resume=config.data.resume == "force")
    seconds = time.perf_counter() - begin
    evaluation = trainer.evaluate() if validation_rows is not None else {}
    output = Path(trainer.args.output_dir)
    trainer.save_model(str(output))
    summary = summarize(trainer.state.log_history, evaluation) | {
        "target": config.training.target_label,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens": trainer.state.num_input_tokens_seen,
        "seconds": round(seconds, 2),
        "resumed_from": checkpoint,
        "filter": trainer.preparation.filtered,
        "warnings": [
            *(f"{name} data: {line}" for name, lines in trainer.preparation.audits.items() for line in lines),
            *trainer.watch.said,
        ],
    }
    if trainer.is_world_process_zero():
        write_records(output, config, summary)
        trainer.create_model_card()  # once more: only the config names the files
        print_summary(summary, output)
        for line in after_training(output, config.data.validation_file):
            typer.echo(line)
    trainer.end()
    let_gloo_go()
    return summary


def let_gloo_go() -> None:
    """A moment for gloo's thread to drop the last collective, before the trainer and with it the process group goes.

    It needs the GIL for that, and torch's destructor of the group waits for it with the GIL held (2.13): now and then a
    finished run would hang.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and "gloo" in str(dist.get_backend()):
        time.sleep(0.2)


def say_advice(trainer: Any, config: RunConfig, rows: Rows) -> None:
    """What `qtarget audit-data` would say of the chosen target: by a comparison of these rows, by the base's numbers.

    Args:
        rows: the config's.
    """
    from qtarget.cli.compared import found_comparison
    from qtarget.cli.options.frozen import found_reference
    from qtarget.integrations.sft.advice import advice_for
    from qtarget.report.audit.advice import about_target
    from qtarget.scoring.cache.reader import ReferenceCache
    from qtarget.scoring.cache.schema import MANIFEST

    if not trainer.is_world_process_zero():
        return
    compared, path = found_comparison(config, rows[0]), found_reference(config, rows)
    lines = [] if compared is None else [compared.in_training()]
    # a cache of the base, which this target may not need; one that is not finished says nothing
    if path is not None and (Path(path) / MANIFEST).is_file():
        cache = trainer.caches.get("reference") or ReferenceCache.open(path, verify=False)
        advice = advice_for(trainer, cache, compared)
        if advice is not None:
            lines = about_target(advice, trainer.args.target, guard=trainer.args.guard)
    for line in lines:
        logger.warning("%s", line)


def score_teacher(config: RunConfig) -> None:
    """Ask a teacher behind a URL once, before training: its numbers go into a cache under ``output_dir``.

    With ``teacher_model_name_or_path`` beside the URL that model is loaded, and the server must give its numbers; without,
    the server is trusted. With ``cache_verify_key`` the cache is signed as soon as it is whole. An interrupted scoring goes
    on where it stopped; a finished one asks nobody.

    Raises:
        ScoringServerError: the server fails, or is not what it should be.
    """
    from qtarget.cli.score import run_scoring
    from qtarget.scoring.cache.schema import MANIFEST
    from qtarget.scoring.cache.signature import check_signature, read_key, sign
    from qtarget.scoring.sources.engines import EngineChoice, detect_engine
    from qtarget.storage.files import write_atomic

    training, url = config.training, str(config.training.teacher_url)
    key = None if training.cache_verify_key is None else read_key(training.cache_verify_key)
    folder = Path(str(training.output_dir)) / TEACHER_CACHE
    # one process in all asks and writes, whatever the number of machines; the others wait and read
    with training.main_process_first(local=False, desc="scoring the teacher"):
        if key is not None and training.process_index == 0 and (folder / MANIFEST).is_file():
            check_signature(folder, key)  # never signed here a second time: it may have been changed since
        if (
            training.process_index == 0
            and _needs_teacher(config)
            and not has_said_all(folder, url, training.teacher_top_k, key)
        ):
            engine = EngineChoice(detect_engine(url), url, trust_server=training.teacher_model_name_or_path is None)
            # a warning, so that it is seen: nobody has set a level for this logger
            logger.warning(
                "teacher: %s is a %s server, asked once for all rows: its numbers go to %s", url, engine.name, folder
            )
            run_scoring(config, folder, training.teacher_top_k, "bucket", "teacher", engine)
            if key is not None:  # what this run wrote itself is whole when it is read, and when the run is resumed
                sign(folder, key)
            write_atomic(folder / TEACHER_URL, url.encode())
    training.teacher_cache = str(folder)


def has_said_all(folder: Path, url: str, top_k: int, key: bytes | None = None) -> bool:
    """Whether a folder is a whole cache of this URL's answers, signed where there is a key; the log says what is wrong with it."""
    from qtarget.core.errors import CacheMismatchError
    from qtarget.scoring.cache.reader import ReferenceCache

    asked = folder / TEACHER_URL
    if not asked.is_file() or asked.read_text(encoding="utf-8") != url:
        return False
    try:
        cache = ReferenceCache.open(folder, key=key)
    except CacheMismatchError as error:
        logger.warning("%s; asking %s again", error, url)
        return False
    if cache.manifest.top_k == top_k:
        logger.warning("teacher: %s is finished; %s is not asked again", folder, url)
    return cache.manifest.top_k == top_k


def _needs_teacher(config: RunConfig) -> bool:
    return bool(config.training.build_target().needs.teacher)


def build_trainer(config: RunConfig, train_rows: Any, validation_rows: Any) -> Any:
    """The trainer that ``trl sft`` would build, with our loss."""
    from trl import get_peft_config, get_quantization_config  # pyright: ignore[reportPrivateImportUsage]

    from qtarget.cli.options.models import set_model_arguments
    from qtarget.integrations.sft.trainer import QTargetTrainer

    set_model_arguments(config)
    return QTargetTrainer(
        config.model.model_name_or_path,
        config.training,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        peft_config=get_peft_config(config.model),
        quantization_config=get_quantization_config(config.model),
    )


def summarize(log_history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, float]) -> dict[str, Any]:
    """First and last logged values of the training curve, the steps of these logs, and the final evaluation.

    Args:
        log_history: ``trainer.state.log_history``; the last steps of a run log no ``loss``, and all else.
        evaluation: ``trainer.evaluate()``, or empty.

    Example:
        >>> log = [{"step": 5, "loss": 2.0, "nll": 2.5}, {"step": 7, "train_loss": 2.0, "nll": 1.5}]
        >>> found = summarize(log, {"eval_nll": 1.25})
        >>> found["first_nll"], found["last_nll"], found["eval_nll"], found["logged"]
        (2.5, 1.5, 1.25, {'loss': [5], 'nll': [5, 7]})
    """
    from qtarget.report.runs.document import training_lines

    out: dict[str, Any] = {}
    logged: dict[str, list[int]] = {}
    for key, name in (("loss", "loss"), ("nll", "nll"), ("mean_token_accuracy", "token_accuracy")):
        if lines := [line for line in training_lines(log_history) if key in line]:
            out |= {f"first_{name}": lines[0][key], f"last_{name}": lines[-1][key]}
            logged[name] = sorted({line.get("step", 0) for line in (lines[0], lines[-1])})
    out |= {"logged": logged} if logged else {}
    kept = ("eval_loss", "eval_nll", "eval_mean_token_accuracy")
    return out | {key: evaluation[key] for key in kept if key in evaluation}


def print_summary(summary: Mapping[str, Any], output: Path) -> None:
    """The run in one small table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"trained with target {summary['target']}", show_header=False)
    names = {
        "steps": "steps",
        "epochs": "epochs",
        "tokens": "tokens seen",
        "seconds": "seconds",
        "eval_loss": "validation loss",
        "eval_nll": "validation nll (nats a token)",
        "eval_mean_token_accuracy": "validation token accuracy",
    }
    for key, name in (("loss", "loss"), ("nll", "nll (nats a token)"), ("token_accuracy", "token accuracy")):
        if f"first_{key}" in summary:
            steps, ends = summary["logged"][key], [summary[f"first_{key}"], summary[f"last_{key}"]]
            where = f"steps {steps[0]} and {steps[-1]}" if steps[1:] else f"step {steps[0]}"
            table.add_row(f"{name}, log of {where}", " -> ".join(f"{end:.4f}" for end in ends[: len(steps)]))
    for key, name in names.items():
        value = summary.get(key)
        if value is not None:
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
    if (filtered := summary.get("filter")) is not None:
        table.add_row("rows left out by the filter", f"{filtered['left_out']:,} of {filtered['rows']:,}")
    console = Console()
    console.print(table)
    for warning in summary["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)  # a command in it can be pasted
    console.print(
        Text(
            f"saved to {output.resolve()} ({saved_model(output)}, tokenizer, README.md, {CONFIG_FILE}, {SUMMARY_FILE})"
        ),
        soft_wrap=True,
    )
