"""Frozen models of a run: where their caches lie."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.command import command_for, from_here
from qtarget.core.errors import ConfigError
from qtarget.data.fields import WEIGHTS

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig
    from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe

FROZEN_KEYS = {
    "reference": ("reference", "reference_cache", "reference_model_name_or_path", "reference_top_k"),
    "teacher": ("teacher", "teacher_cache", "teacher_model_name_or_path", "teacher_top_k"),
    "witness": ("witness",),
}
"""Keys of a config by the frozen model that they name: a contender that asks none of them is the same without."""
SETTINGS = ("unplaced_spans", "completion_only_loss", "dataset_kwargs")
"""Of a run, beside ``DATA_SETTINGS``, that decide which numbers are cached."""
logger = logging.getLogger(__name__)
Rows = tuple[Any, Any]
"""Training and validation rows; the second may be None."""


def found_reference(config: RunConfig, rows: Rows | None = None) -> str | None:
    """The base's cache that the config names, or one that lies where training would look; None without either."""
    training = config.training
    if training.reference_cache is not None or training.reference == "live":
        return training.reference_cache
    parent = Path(os.path.abspath(str(training.output_dir))).parent
    if not any(parent.glob("reference_cache-*")):
        return None
    place = cache_place(config, "reference", training.reference_top_k, rows)
    return str(place) if is_finished(place) else None


def cache_place(config: RunConfig, role: str, top_k: int, rows: Rows | None = None) -> Path:
    """Where the cache of these rows, this model and these settings lies: beside ``output_dir``.

    Args:
        rows: the config's; read where they are not given.
    """
    return _place(config, f"{role}_cache", [role, top_k, *_settings(config), _model(config, role)], rows)


def witness_place(config: RunConfig, recipe: CrossfitRecipe, rows: Rows | None = None) -> Path:
    """Where the cross-fit of these rows by this base and this recipe lies: beside ``output_dir``."""
    from qtarget.integrations.sft.crossfit.recipe import stated

    how = [recipe.folds, config.training.seed, stated(recipe, config.training)]
    how += [] if recipe.prompts else ["each answer under its own prompt alone"]
    return _place(config, "witness", [*how, *_settings(config), _model(config, "reference")], rows, WEIGHTS)


def found_witness(config: RunConfig, rows: Rows | None = None) -> str | None:
    """The finished cross-fit that the config names, or one that lies where training would look; None without either."""
    from qtarget.integrations.sft.crossfit.recipe import CrossfitRecipe

    named = config.training.witness
    if named is not None and not is_finished(Path(named)):
        state = "is not finished" if Path(named).exists() else "is not there yet"
        logger.warning("witness: %s %s, so no copies are asked; `%s`", named, state, resume_command(Path(named)))
        return None
    if named is not None:
        return named
    parent = Path(os.path.abspath(str(config.training.output_dir))).parent
    if not any(parent.glob("witness-*")):
        return None
    place = witness_place(config, CrossfitRecipe(), rows)
    return str(place) if is_finished(place) else None


def _place(config: RunConfig, name: str, parts: list[Any], rows: Rows | None, more: tuple[str, ...] = ()) -> Path:
    """A folder beside ``output_dir`` that ``parts`` and the config's rows decide.

    Args:
        more: columns that count beside what is trained, where a row has them.
    """
    from qtarget.cli.options.datasets import load_datasets

    parent = Path(os.path.abspath(str(config.training.output_dir))).parent
    data = load_datasets(config, overlap=False) if rows is None else rows
    field = config.training.dataset_text_field
    named = [_fingerprint(part, field, more) for part in data if part is not None]
    text = json.dumps([*parts, *named], sort_keys=True, default=str)
    return parent / f"{name}-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"


def _settings(config: RunConfig) -> list[Any]:
    from qtarget.integrations.sft.rows import DATA_SETTINGS

    training = config.training
    template = training.chat_template_path
    content = Path(template).read_text(encoding="utf-8") if template and Path(template).is_file() else template
    named = [getattr(training, key) for key in (*DATA_SETTINGS, *SETTINGS) if key != "chat_template_path"]
    return [*named, content, training.prompt_weight is not None]


def _model(config: RunConfig, role: str) -> list[Any]:
    """The model by name and, of a folder, by what can be seen of its files without reading them."""
    training = config.training
    other = getattr(training, f"{role}_url") or getattr(training, f"{role}_model_name_or_path")
    asked = config.model
    seen: list[Any] = [
        asked.model_revision,
        asked.dtype,
        asked.load_in_4bit,
        asked.load_in_8bit,
        asked.bnb_4bit_quant_type,
    ]
    for name in (str(config.model.model_name_or_path), other):
        files = sorted(path for path in Path(name).iterdir() if path.is_file()) if name and Path(name).is_dir() else []
        seen += [name, [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]]
    return seen


def _fingerprint(rows: Iterable[Any], text_field: str, more: tuple[str, ...]) -> str:
    from qtarget.data.overlap import content_hash

    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(content_hash(row, text_field))
        if told := {name: row[name] for name in more if row.get(name) is not None}:
            state.update(json.dumps(told, sort_keys=True, default=str).encode())
    return state.hexdigest()


def is_finished(place: Path) -> bool:
    """Whether a cache is whole, of a cross-fit with what lies beside it; training verifies what is in it."""
    from qtarget.scoring.cache.schema import MANIFEST
    from qtarget.scoring.contradictions import COPIES

    return (place / MANIFEST).is_file() and not (place / COPIES).exists()


def check_place(place: Path) -> None:
    """Raise where no cache can be made.

    Raises:
        ConfigError: the folder above cannot be written.
    """
    above = next(folder for folder in place.parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise ConfigError(
            f"the frozen base's numbers would go to {place}, which cannot be written; choose another output_dir, or "
            f"`{command_for('score', '--output', 'CACHE', '--top_k', '32')}` and reference: CACHE"
        )


def shown(place: Path) -> str:
    """A path from here, where that is shorter."""
    return from_here(place)


def resume_command(place: Path) -> str:
    """What goes on with a cross-fit that is not finished: the recipe that its plan tells."""
    from qtarget.scoring.cache.plan import PLAN
    from qtarget.scoring.contradictions import COPIES

    told: dict[str, Any] = {}
    for path in (place / PLAN, place / COPIES / PLAN):
        if path.is_file():
            with suppress(ValueError, OSError, TypeError, KeyError):
                told = dict(json.loads(path.read_text(encoding="utf-8"))["crossfit"] or {})
                break
    recipe = told.get("recipe") or {}
    named = {"--crossfit-steps": "steps", "--crossfit-rate": "learning_rate", "--crossfit-rank": "rank"}
    options = [
        part for option, key in named.items() if recipe.get(key) is not None for part in (option, str(recipe[key]))
    ]
    return command_for("score", "--crossfit", str(told.get("folds", 2)), *options, "--output", str(place))
