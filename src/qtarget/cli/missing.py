"""What a training needs of frozen models and no key names: found, or scored first."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.cli.options.frozen import Rows, cache_place, check_place, is_finished, shown, witness_place
from qtarget.command import called_as
from qtarget.core.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe
    from qtarget.integrations.sft.score import Cost

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells its processes; whoever scores is no rank of a training."""
LOOKS = 1.0
"""Seconds between two looks of the ranks that wait."""

logger = logging.getLogger(__name__)


def score_missing(config: RunConfig, rows: Rows) -> None:
    """Score the frozen model that the target needs and no key names, or find what an earlier run scored.

    The cache lies beside ``output_dir``, under a name that its rows, model and settings decide: the next target finds it,
    and other rows find another. An interrupted scoring goes on; of several ranks one scores.

    Args:
        rows: the config's, training and validation.

    Raises:
        ConfigError: the place cannot be written, or another process writes it.
        ScoringServerError: the base is a URL, and its server fails.
    """
    from qtarget.filtering.decision import Filter

    training = config.training
    target = training.build_target()
    if target.needs.teacher and training.teacher_url is None and training.teacher_cache is None:
        training.teacher_cache = scored_teacher(config, rows)
    if (asked_by := asks_witness(config)) is not None:
        training.witness = witness_for(config, rows, asked_by)
    if training.reference_model_name_or_path is not None or training.reference == "live":
        return
    if target.needs.reference or Filter.of(training.filter):
        asked_by = f"target {training.target_label}" if target.needs.reference else "the filter"
        training.reference_cache = reference_for(config, rows, asked_by)


def reference_for(config: RunConfig, rows: Rows, asked_by: str) -> str:
    """The base's cache: the one that the config names, the one that an earlier run scored, or a new one.

    Args:
        rows: the config's.
        asked_by: who needs it, in words.

    Raises:
        ConfigError: the place cannot be written, or another process writes it.
    """
    training = config.training
    if training.reference_cache is not None:
        return training.reference_cache
    place = cache_place(config, "reference", training.reference_top_k, rows)
    found = f"reference: {shown(place)} is taken, which these rows and this model were scored into"
    return found_or_made(config, place, found, lambda: score_reference(config, place, rows, asked_by))


def found_or_made(config: RunConfig, place: Path, found: str, make: Callable[[], None]) -> str:
    """A finished cache, or one that the first rank makes while the others wait.

    Args:
        found: said where it is finished.

    Raises:
        ConfigError: the place cannot be written, or another process writes it.
    """
    if config.training.process_index == 0:
        if is_finished(place):
            logger.warning("%s", found)
        else:
            check_place(place)
            make()
    wait_for(place, config.training.ddp_timeout)
    return str(place)


def asks_witness(config: RunConfig, filtered: Any = None) -> str | None:
    """Who asks copies that have not seen the rows, in words: a config's target, or its filter; None where nobody does.

    Args:
        filtered: a filter in the place of the config's.
    """
    from qtarget.core.types import WITNESS_FIELDS
    from qtarget.filtering import WITNESSES, Filter

    training = config.training
    needs = training.build_target().needs
    if (needs.reference | needs.teacher) & set(WITNESS_FIELDS):
        return f"target {training.target_label}"
    rule = Filter.of(training.filter if filtered is None else filtered).rule
    return f"the filter {rule}" if rule in WITNESSES and WITNESSES[rule].asks_copies else None


def witness_for(config: RunConfig, rows: Rows, asked_by: str) -> str:
    """The cross-fit: the one that the config names, the one that an earlier run made, or a new one of the default recipe.

    Args:
        rows: the config's.
        asked_by: who needs it, in words.

    Raises:
        ConfigError: the place cannot be written, or another process writes it.
        DataError: fewer prompts than folds.
    """
    from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe

    training, recipe = config.training, CrossfitRecipe()
    if training.witness is not None:
        return training.witness
    place = witness_place(config, recipe, rows)
    found = f"witness: {shown(place)} is taken, whose copies these rows have trained"
    return found_or_made(config, place, found, lambda: judge_rows(config, recipe, place, rows, asked_by))


def judge_rows(config: RunConfig, recipe: CrossfitRecipe, place: Path, rows: Rows, asked_by: str) -> None:
    """Train the copies and score the rows, in this process, or in one of its own beside several ranks."""
    from qtarget.cli.crossfit import announcement as of_copies
    from qtarget.integrations.sft.crossfit.recipe import batch_of

    logger.warning("%s", of_copies(asked_by, recipe, len(rows[0]), shown(place), batch_of(config.training)))
    if config.training.world_size > 1 or config.training.deepspeed:
        score_apart(config, place, "--crossfit", str(recipe.folds))
        return
    from qtarget.cli.crossfit import run_crossfit
    from qtarget.cli.score import how_to_go_on

    numbers = recipe.folds, recipe.steps, recipe.learning_rate, recipe.rank, recipe.prompts
    run_crossfit(config, place, numbers, how_to_go_on, rows=rows, top_k=0)


def scored_teacher(config: RunConfig, rows: Rows) -> str | None:
    """The cache of a teacher that `qtarget score` wrote where training looks; None where there is none."""
    training = config.training
    parent = Path(os.path.abspath(str(training.output_dir))).parent
    if training.teacher_model_name_or_path is None or not any(parent.glob("teacher_cache-*")):
        return None
    place = cache_place(config, "teacher", training.teacher_top_k, rows)
    if not is_finished(place):
        return None
    logger.warning("teacher: %s is taken, where it was scored; nothing runs live", shown(place))
    return str(place)


def score_reference(config: RunConfig, place: Path, rows: Rows, asked_by: str) -> None:
    """Run the base over all rows, in this process, or in one of its own beside several ranks."""
    from qtarget.scoring.sources.engines import EngineChoice, detect_engine

    training = config.training
    if training.world_size > 1 or training.deepspeed:
        score_apart(config, place)
        return
    from qtarget.cli.score import run_scoring

    url = training.reference_url
    engine = None if url is None else EngineChoice(detect_engine(url), url)

    def announce(cost: Cost) -> None:
        logger.warning("%s", announcement(asked_by, cost, place))

    top_k = training.reference_top_k
    run_scoring(config, place, top_k, "bucket", "reference", engine, rows=rows, announce=announce)


def announcement(asked_by: str, cost: Cost, place: Path) -> str:
    """What is about to be scored, and what it takes.

    Example:
        >>> from types import SimpleNamespace
        >>> cost = SimpleNamespace(rows=600, tokens=9000, bytes=790_000, seconds=4.2)
        >>> print(announcement("target asft", cost, Path("runs/reference_cache-1")).partition(":")[2].partition(";")[0].strip())
        600 rows, 9,000 tokens, about 0.8 MB and 5 s, into runs/reference_cache-1
    """
    took = "" if cost.seconds is None else f" and {max(1, round(cost.seconds + 0.5)):,} s"
    return (
        f"reference, scored once for {asked_by}: {cost.rows:,} rows, {cost.tokens:,} tokens, about "
        f"{cost.bytes / 1e6:,.1f} MB{took}, into {shown(place)}; the next target with an output_dir there takes it "
        "(`reference: live` would run the base at each step)"
    )


def score_apart(config: RunConfig, place: Path, *options: str) -> None:
    """Score in a process that is no rank: TRL's preparation meets all ranks at barriers, and the others only wait.

    Raises:
        ConfigError: it failed; its words stand above.
    """
    import yaml

    from qtarget.cli.options.config import resolved_settings

    settings = resolved_settings(config) | {"deepspeed": None, "fsdp": None, "fsdp_config": None}
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHED} | called_as()
    environment = {
        key: value for key, value in environment.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(settings, allow_unicode=True), encoding="utf-8")
        top_k = "0" if options else str(config.training.reference_top_k)
        command = [
            sys.executable,
            "-m",
            "qtarget.cli.main",
            "score",
            str(path),
            "--top-k",
            top_k,
            "--output",
            str(place),
            *options,
        ]
        if not options and (url := config.training.reference_url) is not None:
            from qtarget.scoring.sources.engines import detect_engine

            command += ["--engine", detect_engine(url), "--url", url]
        what = "witness: cross-fitted" if options else "reference: scored"
        logger.warning("%s once into %s; the other ranks wait", what, shown(place))
        if subprocess.run(command, env=environment, check=False).returncode:
            raise ConfigError(f"the frozen base could not be scored into {shown(place)}; the lines above say why")


def wait_for(place: Path, limit: float) -> None:
    """Look until the cache is whole; whoever writes it shows a sign of life every few seconds (``qtarget.storage.locks``).

    Args:
        limit: seconds without any sign.

    Raises:
        StorageError: there was none for so long.
    """
    seen, since = signs(place), time.monotonic()
    while not is_finished(place):
        if (now := signs(place)) != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > limit:
            raise StorageError(
                f"{place}: nothing was written there for {limit:,.0f} s, and other ranks wait for it; the process that scores has "
                "ended, or needs longer: see its own lines, and raise ddp_timeout"
            )
        time.sleep(LOOKS)


def signs(place: Path) -> float:
    """When something in a folder, or in its copies', was last written; 0 where there is none."""
    from qtarget.scoring.contradictions import COPIES

    latest = 0.0
    for folder in (place, place / COPIES):
        for path in (folder, *(folder.iterdir() if folder.is_dir() else ())):
            with suppress(OSError):  # gone while we look
                latest = max(latest, path.stat().st_mtime)
    return latest
