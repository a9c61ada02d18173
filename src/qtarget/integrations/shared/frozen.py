"""Frozen models of a run: which caches are open, whether they fit, and which models run live."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from qtarget.command import command_for
from qtarget.core.errors import CacheMismatchError, ConfigError, IncompatibleError, MissingStatisticError
from qtarget.core.types import DATA_FIELDS, WITNESS_FIELDS, Target, missing_message, sampled_message
from qtarget.integrations.shared.adapters import refuse_shared_weights, without_wrapper
from qtarget.integrations.shared.heads import HeadSpec, probe_head
from qtarget.integrations.shared.step import ROLES
from qtarget.loss.zero3 import is_split, whole_shape
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import MANIFEST, fingerprint_model
from qtarget.scoring.cache.signature import read_key
from qtarget.scoring.cache.verify import check_plan
from qtarget.storage.models import load_named, load_whole

logger = logging.get_logger(__name__)


class FrozenSettings(Protocol):
    """The keys about frozen models that any trainer's config has."""

    reference: str | None
    teacher: str | None
    reference_url: str | None
    teacher_url: str | None
    teacher_cache: str | None
    teacher_model_name_or_path: str | None
    reference_cache: str | None
    reference_model_name_or_path: str | None
    vocab_padding: str
    allow_new_weights: bool
    cache_verify_key: str | None


def open_caches(
    args: FrozenSettings, target: Target, models: dict[str, PreTrainedModel | None]
) -> dict[str, ReferenceCache]:
    """Open the caches that the target needs, and refuse at once when a need has no source.

    Raises:
        MissingStatisticError, IncompatibleError: see the message.
        CacheMismatchError: a cache is damaged, edited, or not signed with ``cache_verify_key``.
        ConfigError: there is no such key; or the teacher is a URL, which nobody has scored yet.
    """
    caches: dict[str, ReferenceCache] = {}
    key = None if args.cache_verify_key is None else read_key(args.cache_verify_key)
    for role in ROLES:
        fields, path = getattr(target.needs, role), getattr(args, f"{role}_cache")
        if not fields:
            check_unused(args, target, role)
            continue
        if path is not None:
            caches[role] = ReferenceCache.open(path, key=key)
            check_plan(caches[role])
            check_columns(caches[role], target, role)
        elif (url := getattr(args, f"{role}_url", None)) is not None:
            raise ConfigError(
                f"{role}: {url} is asked once, before training; `qtarget train` does that, from Python call "
                f"qtarget.integrations.sft.score.score and set {role} to the folder"
            )
        elif fields & set(DATA_FIELDS):
            named = _named_live(args, role)
            raise MissingStatisticError(
                f"target {target.name!r} weighs what the rows agree on against the frozen {role}'s numbers, all of them before "
                f"training{named}: {way_out(role)}"
            )
        elif models[role] is None and getattr(args, f"{role}_model_name_or_path") is None:
            raise MissingStatisticError(
                f"target {target.name!r} needs a frozen {role}: {way_out(role)}, or run one live: set {role}: "
                f"{'live' if role == 'reference' else 'MODEL'}"
            )
    return caches


def _named_live(args: FrozenSettings, role: str) -> str:
    """What is set that names a model to run live, as the user wrote it; empty without."""
    name = getattr(args, f"{role}_model_name_or_path")
    if name is None:
        return ""
    short = getattr(args, role)
    said = f"{role}: {short}" if short in ("live", name) else f"{role}_model_name_or_path: {name}"
    return f" ({said} is no file of numbers, but a model to run live)"


def same_source(args: Any) -> dict[str, Any]:
    """Options of ``from_pretrained`` that ``reference: live`` shares with the trained model."""
    if getattr(args, "reference", None) != "live":
        return {}
    options = args.model_init_kwargs or {}
    return {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key) is not None}


def way_out(role: str) -> str:
    """How a cache comes about, in words."""
    by_itself = "`qtarget train` scores it where reference is unset; from Python " if role == "reference" else ""
    whose = ("--teacher", "MODEL") if role == "teacher" else ()
    return f"{by_itself}run `{command_for('score', '--role', role, *whose, '--output', 'CACHE')}` and set {role}: CACHE"


def open_witness(path: str | None, target: Target, key: str | None) -> ReferenceCache | None:
    """The cross-fitted cache that the target asks, or None; a witness that it does not ask is read all the same.

    Args:
        path: of ``witness``.
        key: of ``cache_verify_key``.

    Raises:
        MissingStatisticError: the target asks one, and none is named.
        CacheMismatchError: it is damaged, edited, or not signed with the key.
    """
    asked = (target.needs.reference | target.needs.teacher) & set(WITNESS_FIELDS)
    if path is None:
        if asked:
            raise MissingStatisticError(missing_message(target.name, "reference", min(asked)))
        return None
    if not asked and not (Path(path) / MANIFEST).is_file():  # it is yet to be, and waits for another target
        return None
    found = ReferenceCache.open(path, key=None if key is None else read_key(key))
    check_plan(found)
    return found if asked else None


def check_unused(args: FrozenSettings, target: Target, role: str) -> None:
    """A key that this target does not read is read all the same: a wrong one would wait for the next target.

    Raises:
        ConfigError: there is no such model.
        CacheMismatchError: there is no such cache, or it is damaged.
    """
    path, name = getattr(args, f"{role}_cache"), getattr(args, f"{role}_model_name_or_path")
    if path is not None and (Path(path) / MANIFEST).is_file():  # one that is not finished waits for another target
        ReferenceCache.open(path)
    if path is not None and Path(path).is_file():
        raise ConfigError(f"{role}_cache: {path} is a file; expected a folder that `qtarget score` writes")
    if name is not None:
        load_named(AutoConfig, f"{role}_model_name_or_path", name)
        logger.warning(f"target {target.name!r} does not use {role}_model_name_or_path: {name} is not loaded")


def check_columns(cache: ReferenceCache, target: Target, role: str) -> None:
    """Make sure that a cache holds what the target reads of it.

    Raises:
        MissingStatisticError: a column that the target needs is absent.
        IncompatibleError: draws, for a target that they would bias.
    """
    known = {*cache.manifest.columns, *(["distribution"] if cache.has_topk else []), *DATA_FIELDS}
    for name in sorted(getattr(target.needs, role)):
        if name not in known:
            raise MissingStatisticError(
                f"{missing_message(target.name, role, name)}; {cache.path} holds {', '.join(cache.manifest.columns)} only"
            )
        if name == "distribution" and cache.manifest.sampled and not target.linear_in_frozen:
            raise IncompatibleError(sampled_message(target.name, role))


def check_caches(args: FrozenSettings, caches: dict[str, ReferenceCache], base: PreTrainedModel) -> None:
    """A reference is the model that training starts from, unless the configuration names another.

    Raises:
        CacheMismatchError: a cache of another model.
    """
    head: Any = base.get_output_embeddings()
    unnamed = [role for role in caches if getattr(args, f"{role}_model_name_or_path") is None]
    # it reads all weights: only where something is compared with it
    ours = fingerprint_model(base) if unnamed else None
    for role, cache in caches.items():
        if role == "reference":
            cache.require(vocab_size=whole_shape(head.weight)[0])
        named = getattr(args, f"{role}_model_name_or_path")
        if named is not None and cache.manifest.model_id != named:
            raise CacheMismatchError(
                f"{role}_cache was made with model {cache.manifest.model_id!r}, {role}_model_name_or_path says {named!r}; "
                "score again with that model, or correct the name"
            )
        if named is None and role == "reference":
            cache.require(model_fingerprint=ours)
        elif named is None and cache.manifest.model_fingerprint == ours:
            logger.warning("teacher_cache was made with the very model that is trained: the teacher is the base itself")


def load_frozen(
    args: FrozenSettings,
    target: Target,
    caches: dict[str, ReferenceCache],
    given: dict[str, PreTrainedModel | None],
    trained: PreTrainedModel,
    accelerator: Any,
) -> dict[str, tuple[PreTrainedModel, HeadSpec]]:
    """The frozen models that run beside the live one: those that the target needs and no cache replaces.

    Args:
        given: models handed to the trainer; they come before names.
        trained: gives its dtype to models that are loaded by name.

    Raises:
        ConfigError: there is no such model, it is the trained one, or DeepSpeed would split it.
        UnsupportedModelError: its head, or its kind of adapter.
    """
    loaded: dict[str, tuple[PreTrainedModel, HeadSpec]] = {}
    for role in ROLES:
        model, path = given[role], getattr(args, f"{role}_model_name_or_path")
        if role in caches or not getattr(target.needs, role) or (model is None and path is None):
            continue
        if is_deepspeed_zero3_enabled() and (model is None or any(is_split(p) for p in model.parameters())):
            raise ConfigError(
                f"DeepSpeed ZeRO-3 splits what is loaded under it, and no engine gathers a frozen {role}; score it once "
                f"(`{command_for('score', '--role', role)}`), or pass {role}_model as a model loaded before the config"
            )
        if model is None:
            allowed = args.allow_new_weights
            options = same_source(args) if role == "reference" else {}
            model = load_whole(f"{role} model", path, allow_new_weights=allowed, dtype=trained.dtype, **options)
        refuse_shared_weights(role, model, trained)
        model = without_wrapper(role, model).to(accelerator.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        with accelerator.autocast():  # as in training: some attention kernels refuse float32
            loaded[role] = (model, probe_head(model))
    return loaded
