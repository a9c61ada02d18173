"""``qtarget rl``: train on samples of the model's own, with rewards, a teacher, or both."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig

FIRST_AND_LAST = {
    "reward": "reward",
    "entropy": "entropy",
    "ratio/max": "largest_ratio",
    "kl/start": "kl_to_start",
    "divergence/kl_k3": "kl_to_sampler",
    "region/blocked": "blocked",
}
"""What of the log goes into the summary, and its name there."""


@dataclass(frozen=True)
class RolloutConfig:
    """Python that takes part in a run; every name is ``package.module:function``.

    Attributes:
        reward_funcs: one or several reward functions, as TRL calls them; or names of reward models.
        tools: functions that the model may call.
        environment_factory: makes the environment of a sample.
        rollout_func: draws the samples in place of TRL.
        limits: what of a file of rows is refused beyond (docs/rows.md).
        algorithm: so that `qtarget train` reads the config that a run leaves.
    """

    reward_funcs: str | list[str] | None = None
    tools: list[str] | None = None
    environment_factory: str | None = None
    rollout_func: str | None = None
    limits: dict[str, Any] | None = None
    algorithm: str = "rl"


def rl(
    context: typer.Context,
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="Keys of TRL's GRPOConfig and ModelConfig, and qtarget's.")
    ],
) -> None:
    """Train on the model's own samples: any key of CONFIG.yaml can be overridden by `--key value`.

    `reward_funcs: package.module:function` is imported, so its code runs; the current directory is searched after the
    installed packages.
    """
    run_rl(load_rl_config(config, context.args), beside=[config])


def load_rl_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """``load_config`` with TRL's ``GRPOConfig`` and the keys of ``RolloutConfig``."""
    from qtarget.cli.options.config import build_config
    from qtarget.cli.options.settings import RL, check_algorithm, read_settings
    from qtarget.integrations.rl.config import QTargetGRPOConfig

    settings = read_settings(path, overrides)
    check_algorithm(settings, RL)
    return build_config(settings, path, training=QTargetGRPOConfig, parts=[RolloutConfig])


def run_rl(config: RunConfig, beside: Sequence[Path] = ()) -> dict[str, Any]:
    """Train, save model, tokenizer, config and summary into ``output_dir``; returns the summary.

    Args:
        beside: files that may lie in ``output_dir`` already, as the config.

    Raises:
        ConfigError: the output folder holds an earlier run and ``resume`` is not set, or a setting is refused.
        RewardError: a reward function raised, or returned what is no reward.
    """
    from qtarget.cli.options.interrupts import on_interrupt
    from qtarget.cli.options.started import how_to_go_on
    from qtarget.storage.folders import RUN, owned

    training, read = config.training, [*config.inputs, config.data.dataset_name]
    output = Path(str(training.output_dir))
    with ExitStack() as stack:
        if training.process_index == 0:
            stack.enter_context(owned(str(output), RUN, option="output_dir", inputs=read, beside=beside))
        stack.enter_context(on_interrupt(lambda: how_to_go_on(output)))
        return _train_and_save(config)


def _train_and_save(config: RunConfig) -> dict[str, Any]:
    from qtarget.cli.options.started import after_training, starting_point, write_records

    checkpoint = starting_point(config)
    trainer = build_rl_trainer(config, *load_prompt_sets(config))
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint, force_resume=config.data.resume == "force")
    seconds = time.perf_counter() - begin
    evaluation = trainer.evaluate() if trainer.eval_dataset is not None else {}
    output = Path(trainer.args.output_dir)
    trainer.save_model(str(output))
    summary = summarize(trainer.state.log_history, evaluation) | {
        "target": config.training.target_label,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 2),
        "resumed_from": checkpoint,
    }
    if trainer.is_world_process_zero():
        write_records(output, config, summary)
        print_summary(summary, output)
        for line in after_training(output, None):  # prompts need no answers, and an evaluation does
            typer.echo(line)
    return summary


def load_prompt_sets(config: RunConfig) -> tuple[Any, Any]:
    """Training and validation prompts; validation is None if the config names none.

    Raises:
        DataError: the files are unusable, or the hub has no such data set or split.
        ConfigError: prompts that are trained and validated both, or ``eval_strategy`` without validation prompts.
    """
    from qtarget.cli.options.datasets import dataset_split, refuse_same_files, refuse_same_split, row_options
    from qtarget.integrations.rl.inputs.reading import load_prompts, read_prompts

    data = config.data
    options = row_options(data.data_format, data.null_content, data.roles, data.tools_file, config.parts[0].limits)
    if data.train_file is None:
        refuse_same_split(config)
        train = read_prompts(dataset_split(config, data.dataset_train_split), options)
        if config.training.eval_strategy == "no":
            return train, None
        return train, read_prompts(dataset_split(config, data.dataset_test_split), options, "validation data")
    if data.validation_file is None:
        if config.training.eval_strategy != "no":
            raise ConfigError(
                f"eval_strategy is {str(config.training.eval_strategy)!r} without validation_file; set it, or eval_strategy: no"
            )
        return load_prompts(data.train_file, options), None
    refuse_same_files(data.train_file, data.validation_file)
    return load_prompts(data.train_file, options), load_prompts(data.validation_file, options)


def build_rl_trainer(config: RunConfig, train_rows: Any, validation_rows: Any) -> Any:
    """The trainer that ``trl grpo`` would build, with our loss."""
    from trl import get_peft_config, get_quantization_config  # pyright: ignore[reportPrivateImportUsage]

    from qtarget.cli.options.models import set_model_arguments
    from qtarget.integrations.rl.trainer import QTargetGRPOTrainer

    set_model_arguments(config)
    (rollouts,) = config.parts
    return QTargetGRPOTrainer(
        str(config.model.model_name_or_path),
        loaded(rollouts.reward_funcs, "reward"),
        config.training,  # pyright: ignore[reportArgumentType]
        train_rows,
        validation_rows,
        peft_config=get_peft_config(config.model),
        quantization_config=get_quantization_config(config.model),
        tools=loaded(rollouts.tools, "tool"),
        environment_factory=loaded(rollouts.environment_factory, "environment_factory"),
        rollout_func=loaded(rollouts.rollout_func, "rollout_func"),
    )


def loaded(name: str | list[str] | None, what: str) -> Any:
    """The Python behind ``package.module:function``; a name without a colon is that of a model.

    Raises:
        UnknownNameError: nothing of that name can be imported.
    """
    from qtarget.registry import load_outside

    if name is None or (isinstance(name, str) and ":" not in name):
        return name
    if isinstance(name, list):
        return [loaded(one, what) for one in name]
    return load_outside(name, what, "package.module:function")


def summarize(log_history: Sequence[Mapping[str, Any]], evaluation: Mapping[str, float]) -> dict[str, Any]:
    """First and last logged values of what matters, and the final evaluation.

    Example:
        >>> summarize([{"reward": 0.25}, {"loss": 1.0}, {"reward": 0.5}], {"eval_reward": 0.75, "eval_runtime": 3.0})
        {'first_reward': 0.25, 'last_reward': 0.5, 'eval_reward': 0.75}
    """
    out: dict[str, Any] = {}
    for key, name in FIRST_AND_LAST.items():
        if values := [line[key] for line in log_history if line.get(key) is not None]:
            out |= {f"first_{name}": values[0], f"last_{name}": values[-1]}
    return out | {key: evaluation[key] for key in ("eval_loss", "eval_reward", "eval_entropy") if key in evaluation}


def print_summary(summary: Mapping[str, Any], output: Path) -> None:
    """The run in one small table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from qtarget.cli.options.started import saved_model
    from qtarget.integrations.shared.records.terminal import without_noise

    table = Table(title=f"trained on samples with {summary['target']}", show_header=False)
    for key, name in FIRST_AND_LAST.items():
        if f"first_{name}" in summary:
            first, last = (without_noise(key, summary[f"{which}_{name}"]) for which in ("first", "last"))
            table.add_row(f"{name.replace('_', ' ')}, first to last log", f"{first:.4g} -> {last:.4g}")
    for key in ("steps", "seconds", "eval_reward", "eval_loss"):
        if summary.get(key) is not None:
            table.add_row(key.replace("_", " "), f"{summary[key]:.4g}" if key != "steps" else str(summary[key]))
    console = Console()
    console.print(table)
    console.print(
        Text(
            f"saved to {output.resolve()} ({saved_model(output)}, tokenizer, README.md, qtarget_config.yaml, train_summary.json)"
        ),
        soft_wrap=True,
    )
