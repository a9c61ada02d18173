"""``qtarget score --crossfit``: rows judged by copies of the base that have not seen them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.integrations.sft.crossfit import CrossfitRecipe
    from qtarget.scoring.cache.schema import Manifest


def run_crossfit(
    config: RunConfig,
    directory: Path,
    recipe: tuple[int, int | None, float, int, bool],
    of_shards: Callable[[Path], str],
    rows: tuple[Any, Any] | None = None,
    **storage: Any,
) -> Manifest:
    """Train the copies and score the rows of a config, tokenised exactly as training does.

    Args:
        recipe: folds, steps, learning rate, rank and prompts of ``CrossfitRecipe``.
        of_shards: says what of the scoring is safe.
        rows: the config's, training and validation; read where they are not given.
        storage: of ``qtarget.integrations.sft.crossfit.crossfit_score``.

    Raises:
        ConfigError, CacheMismatchError, DataError: see ``crossfit_score``.
    """
    from transformers import AutoTokenizer

    from qtarget.cli.options.datasets import load_datasets
    from qtarget.cli.options.interrupts import on_interrupt
    from qtarget.cli.options.models import set_model_arguments
    from qtarget.integrations.sft.crossfit import CrossfitRecipe, crossfit_score

    plan = CrossfitRecipe(*recipe)
    train_rows, validation_rows = load_datasets(config, overlap=False) if rows is None else rows
    set_model_arguments(config)
    name, trust = str(config.model.model_name_or_path), config.training.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, revision=config.model.model_revision, trust_remote_code=trust)
    with on_interrupt(lambda: how_to_go_on(directory, plan.folds, of_shards)):
        return crossfit_score(
            name, config.training, train_rows, validation_rows, tokenizer, directory=directory, recipe=plan, **storage
        )


def announcement(asked_by: str, recipe: CrossfitRecipe, rows: int, place: str, batch: int) -> str:
    """What is about to be trained and scored, and what it takes.

    Args:
        rows: of the training data.
        batch: rows a step.

    Example:
        >>> from qtarget.integrations.sft.crossfit import CrossfitRecipe
        >>> said = announcement("target crossfit_consensus", CrossfitRecipe(), 600, "runs/witness-1", 8)
        >>> print(said.partition("(")[2].partition(")")[0])
        LoRA of rank 16, rate 0.001, 150 steps of 8 rows: 4 times over them
    """
    from qtarget.command import crossfit_command
    from qtarget.data.crossfit.steps import default_steps

    learnt = rows - rows // recipe.folds
    steps = recipe.steps or default_steps(learnt, batch)
    passes = f"{steps:,} steps of {batch:,} rows: {steps * batch / max(1, learnt):.0f} times over them"
    how = f"LoRA of rank {recipe.rank}" if recipe.rank else "all weights"
    return (
        f"witness, cross-fitted once for {asked_by}: {recipe.folds} copies of the base, each trained on about {learnt:,} of "
        f"{rows:,} rows ({how}, rate {recipe.learning_rate:g}, {passes}), judge the other rows, each answer "
        f"under other prompts, too, into {place}; the next run "
        f"with an output_dir there takes it (another recipe: {crossfit_command()})"
    )


def how_to_go_on(directory: Path, folds: int, of_shards: Callable[[Path], str]) -> str:
    """What of a cross-fit that is ended early is safe, in words."""
    from qtarget.integrations.sft.crossfit.jobs import RECEIPT
    from qtarget.scoring.contradictions import COPIES

    trained = len(list((directory / COPIES).glob(f"fold-?*/{RECEIPT}")))
    if (directory / "plan.json").is_file():
        return of_shards(directory)
    return f"{trained} of {folds} copies are trained in {directory}; run the same command again, and it goes on there"


OF_COPIES = {"max_steps": "--crossfit-steps", "num_train_epochs": "", "learning_rate": "--crossfit-rate"}
"""Keys of a training, and the option that says the like of copies."""


def refuse_training_keys(arguments: Sequence[str], verb: str) -> None:
    """Keys of a training on the command line say nothing to copies, which have a recipe of their own.

    Raises:
        ConfigError: there are such, with the command that says it.
    """
    from qtarget.cli.options.settings import parse_overrides
    from qtarget.command import command_for

    given = parse_overrides(arguments)
    if not (named := [key for key in OF_COPIES if key in given]):
        return
    told = [part for key in named if (option := OF_COPIES[key]) for part in (option, f"{given[key].value}")]
    raise ConfigError(
        f"{', '.join(f'--{key}' for key in named)}: `qtarget {verb}` trains no model but copies, which have a recipe of their own; "
        f"leave it out, or say it of the copies: `{command_for('score', '--crossfit', '2', *told, '--output', 'witness')}`"
    )
