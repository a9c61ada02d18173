"""From a config file and overrides to TRL's and our own config objects."""

from __future__ import annotations

import difflib
import glob
import logging
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtarget.cli.options.settings import Setting, check_algorithm, coerce, read_settings
from qtarget.cli.options.typed import verb_options
from qtarget.core.errors import ConfigError, QTargetError
from qtarget.storage.folders import missing_folder

if TYPE_CHECKING:
    from trl import ModelConfig  # pyright: ignore[reportPrivateImportUsage]

    from qtarget.integrations.sft.config import QTargetConfig

PATH_KEYS = (
    "train_file",
    "validation_file",
    "model_name_or_path",
    "reference_cache",
    "teacher_cache",
    "reference",
    "teacher",
    "witness",
    "reference_model_name_or_path",
    "teacher_model_name_or_path",
    "chat_template_path",
    "tools_file",
)
FILE_KEYS = ("train_file", "validation_file")
"""Paths that may be lists or patterns."""
SECRET_KEYS = ("hub_token",)
OTHER_VERBS = ("compare", "algorithm")
"""Keys that one verb reads before it builds the config, and that change nothing of a run."""
COUNTED = {
    "include_num_input_tokens_seen": "non_padding"
}  # the one default that is not TRL's: the summary states tokens
# What other tools call it (docs/migrate.md), by our key or by what to write in its place; difflib would guess another.
OTHER_NAMES = {
    "adapter": "`use_peft: true`",
    "asft_alpha": "`target_kwargs: {kl_weight: ...}`",
    "cutoff_len": "max_length",
    "datasets": "train_file",
    "eaft_alpha": "`target_kwargs: {alpha: ...}`",
    "eaft_k": "`target_kwargs: {top_k: ...}`",
    "finetuning_type": "`use_peft: true`",
    "flash_attention": "attn_implementation",
    "flash_attn": "attn_implementation",
    "kd_trainer": "`target: distillation`",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "lora_target_linear": "`lora_target_modules: [all-linear]`",
    "lr_scheduler": "lr_scheduler_type",
    "neat_packing": "packing",
    "num_epochs": "num_train_epochs",
    "optimizer": "optim",
    "preprocessing_num_workers": "dataset_num_proc",
    "sample_packing": "packing",
    "stage": "nothing: `qtarget train` fine-tunes, `qtarget rl` trains on samples",
    "template": "the tokenizer's own chat template, or a file: `chat_template_path`",
    "train_on_inputs": "`completion_only_loss: false`",
    "train_on_prompt": "`completion_only_loss: false`",
    "use_asft_loss": "`target: asft`",
    "use_dft_loss": "`target: dft`",
    "use_eaft": "`target: eaft`",
    "use_eaft_loss": "`target: eaft`",
    "val_set_size": "`validation_file`; `qtarget init --validation` splits one off",
    "val_size": "`validation_file`; `qtarget init --validation` splits one off",
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "dataset": "dataset_name",
    "data": "train_file",
    "eval_file": "validation_file",
    "test_file": "validation_file",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "max_length": "max_completion_length",
    "objective": "target",
    "loss": "target",
    "torch_dtype": "dtype",
    "resume_from": "resume_from_checkpoint",
}

ANSWERS_ALONE = "`completion_only_loss: true`, in chats `assistant_only_loss: true`"
SWITCHED_OFF = {
    "finetuning_type": "nothing: all weights are trained without `use_peft`",
    "train_on_inputs": ANSWERS_ALONE,
    "train_on_prompt": ANSWERS_ALONE,
}
"""What to write for a key of ``OTHER_NAMES`` that is off; for the other switches nothing."""

LIKE = 0.72
"""How like a known key (``difflib``) an unknown one must be to be taken for it: `eaft_alpha` is 0.70 like `lora_alpha`."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Where the rows come from, and whether to go on with an earlier run.

    Attributes:
        train_file, validation_file: a file of rows, a list of them, or a pattern such as ``data/*.jsonl``; kinds as
            ``qtarget.data.loading.read_files``.
        data_format: the shape of the rows (``qtarget.data.formats.FORMATS``); ``auto`` tells it from the first row.
        null_content: ``refuse`` rows with a message that says nothing, or ``drop`` them and say how many.
        roles: names for roles that are not known: theirs -> the chat template's.
        tools_file: a JSON list of tool schemas, for rows that come without theirs.
        dataset_name, dataset_config, dataset_train_split, dataset_test_split: a data set on the hub or in a folder,
            as TRL's ``ScriptArguments``.
        resume: go on from the last complete checkpoint in ``output_dir``; ``force``: also from one of other settings.
    """

    train_file: str | list[str] | None = None
    validation_file: str | list[str] | None = None
    data_format: str = "auto"
    null_content: str = "refuse"
    roles: dict[str, str] | None = None
    tools_file: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    resume: bool | Literal["force"] = False

    def __post_init__(self) -> None:
        if (self.train_file is None) == (self.dataset_name is None):
            both = "both are given" if self.train_file else "neither is given"
            raise ConfigError(f"set train_file (a file) or dataset_name (the hub), one of them; {both}")
        if self.validation_file is not None and self.dataset_name is not None:
            raise ConfigError("validation_file goes with train_file; with dataset_name use dataset_test_split")

    @property
    def name(self) -> str:
        """The training rows in a few words, for titles."""
        files = [self.train_file] if isinstance(self.train_file, str) else self.train_file or [self.dataset_name or ""]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return Path(files[0]).name + more


@dataclass(frozen=True)
class RunConfig:
    """All that a run needs, and what of it the user said.

    Attributes:
        given: the user's settings, typed, with paths resolved.
        parts: what else a verb reads from the same file.
    """

    training: QTargetConfig
    model: ModelConfig
    data: DataConfig
    given: Mapping[str, Any]
    parts: tuple[Any, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """Files, folders and hub names that a run reads."""
        from qtarget.data.files import expand

        named = [self.given[key] for key in PATH_KEYS if key not in FILE_KEYS and self.given.get(key) is not None]
        named = [name for name in named if name not in ("live", "auto")]
        files = [path for key in FILE_KEYS if self.given.get(key) for path in expand(self.given[key])]
        return [*map(str, files), *named]


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, training: Any = None, parts: Sequence[Any] = ()
) -> RunConfig:
    """Parse, check and build; no model and no data are loaded.

    Paths of files that are read are looked up beside the config file first, then from the current folder;
    ``output_dir`` is TRL's own and starts at the current folder.

    Args:
        training: the class of TRL's arguments; ``QTargetConfig`` by default.
        parts: further dataclasses whose keys the file may hold.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a value of the wrong type, or values that
            contradict each other.
    """
    path = Path(path)
    config = build_config(read_settings(path, overrides), path, training=training, parts=parts)
    idle = sorted(key for key, value in config.given.items() if key.startswith("lora_") and value is not None)
    if idle and config.given.get("use_peft") is None:
        logger.warning("%s: without use_peft: true all weights are trained, and no adapter", ", ".join(idle))
    return config


def build_config(
    settings: Mapping[str, Setting], path: Path, *, training: Any = None, parts: Sequence[Any] = ()
) -> RunConfig:
    """``load_config`` of settings that are read already.

    Args:
        path: the file that they belong to; relative paths start at its folder.
    """
    settings = drop_other_caches(drop_other_targets_kwargs(without_other_verbs(settings)))
    from trl import ModelConfig  # pyright: ignore[reportPrivateImportUsage]

    from qtarget.integrations.sft.config import QTargetConfig
    from qtarget.integrations.shared.numbers import check_numbers

    classes = (training or QTargetConfig, ModelConfig, DataConfig, *parts)
    # reversed: a key that two of them have is typed as the first has it
    hints = {key: value for cls in reversed(classes) for key, value in field_types(cls).items()}
    given = read_given(settings, hints, path, classes[0].__mro__[1].__name__, COUNTED if training is None else {})
    trained, model, data, *others = (_build(cls, given, path) for cls in classes)
    check_numbers(model)
    if len(modules := given.get("lora_target_modules") or []) == 1 and modules != ["all-linear"]:
        model.lora_target_modules = (
            modules  # ModelConfig unpacks a list of one, which peft reads as a regular expression
        )
    if given.get("disable_tqdm") is None and not sys.stderr.isatty():
        trained.disable_tqdm = True  # a bar in a file is a line that nobody reads; log lines say how far it is
    trained.build_target()  # its hyper-parameters, and the contract of one of the user's own
    return RunConfig(trained, model, data, given, tuple(others))


def read_given(
    settings: Mapping[str, Setting],
    hints: Mapping[str, tuple[Any, Any]],
    path: Path,
    arguments: str = "SFTConfig",
    own: Mapping[str, Any] = COUNTED,
) -> dict[str, Any]:
    """The settings typed, with paths resolved, and our own defaults.

    Args:
        hints: type and choices of every known key (``field_types``).
        path: the file that they belong to.
        arguments: TRL's class of arguments, for errors.
        own: defaults that are not TRL's.

    Raises:
        ConfigError: unknown keys, values of another type, a path that is nowhere, or no model.
    """
    refuse_unknown(settings, hints, arguments)
    given = dict(own) | {key: coerce(key, setting, *hints[key]) for key, setting in settings.items()}
    for key in PATH_KEYS:
        if given.get(key) is not None and not (key == "reference" and given[key] in ("live", "auto")):
            find = find_files if key in FILE_KEYS else find_path
            given[key] = find(key, given[key], path.parent)
    if not given.get("model_name_or_path"):
        raise ConfigError(f"{path}: model_name_or_path is missing; set it to a folder or a hub name")
    return given


def build_data(given: Mapping[str, Any], path: Path) -> DataConfig:
    """Where the rows come from; light, as ``DataConfig`` is."""
    return _build(DataConfig, given, path)


def without_other_verbs(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Without the keys that one other verb reads.

    Raises:
        ConfigError: ``algorithm`` is none that there is.
    """
    check_algorithm(settings)
    return {key: setting for key, setting in settings.items() if key not in OTHER_VERBS}


def drop_other_targets_kwargs(settings: Mapping[str, Setting], *, say: bool = True) -> dict[str, Setting]:
    """Without the file's ``target_kwargs`` where the command line chose another target: they belong to the file's."""
    kept = dict(settings)
    chosen, kwargs = kept.get("target"), kept.get("target_kwargs")
    if chosen is not None and kwargs is not None and chosen.text is not None and kwargs.text is None:
        del kept["target_kwargs"]
        if kwargs.value and say:
            logger.warning("target %s: the file's target_kwargs %s are another target's", chosen.value, kwargs.value)
    return kept


def drop_other_caches(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """Without the file's ``reference_cache`` where the command line says ``reference``, and the other way round."""
    kept = dict(settings)
    for role in ("reference", "teacher"):
        for said, other in ((role, f"{role}_cache"), (f"{role}_cache", role)):
            if said in kept and other in kept and kept[said].text is not None and kept[other].text is None:
                del kept[other]
        named, own = kept.get(f"{role}_model_name_or_path"), kept.get(role)
        if named is None or own is None or named.text is None or own.text is not None:
            continue
        # a model in place of a model; beside a cache or a URL it says whose numbers they are
        if not str(own.value).startswith("http") and not (Path(str(own.value)) / "manifest.json").is_file():
            del kept[role]
    return kept


def refuse_unknown(settings: Mapping[str, Setting], known: Iterable[str], arguments: str = "SFTConfig") -> None:
    """Raise for the keys that nobody knows, each with its nearest known one.

    Raises:
        ConfigError: there are such keys.
    """
    known = list(known)
    unknown = [key for key in settings if key not in known]
    if not unknown:
        return
    chosen = settings.get("target")
    typed = {key for key in unknown if settings[key].origin == "the command line"}
    options = verb_options()
    parts = [
        f"{key!r} ({settings[key].origin}{_hint(key, settings[key].value, known, chosen, options if key in typed else ())})"
        for key in unknown
    ]
    theirs = "; docs/migrate.md has the keys of other tools" * any(key in OTHER_NAMES for key in unknown)
    raise ConfigError(
        f"unknown {'key' if len(parts) == 1 else 'keys'} {', '.join(parts)}; keys are TRL's {arguments} and "
        f"ModelConfig and qtarget's{theirs}"
    )


def _hint(key: str, value: Any, known: list[str], target: Setting | None, options: Iterable[str] = ()) -> str:
    if key in _target_hyperparameters(target):
        return f"; a hyper-parameter of the target: write target_kwargs: {{{key}: ...}}"
    meant = OTHER_NAMES.get(key)
    if meant is not None and not meant.isidentifier():
        if value in (False, None, "full"):
            meant = SWITCHED_OFF.get(key, "nothing: leave it out")
        is_sampled = "num_generations" in known and "`target" in meant  # `rl` has no targets of demonstrations
        told = not is_sampled and all(ours in known for ours in re.findall(r"`(\w+)[:`]", meant))
        return f"; here it is {meant}" if told else ""
    spelt = dict.fromkeys(known) | {name[2:].replace("-", "_"): name for name in options}
    near = [meant] if meant in known else difflib.get_close_matches(key, list(spelt), n=1, cutoff=LIKE)
    near = [spelt.get(name) or name for name in near]
    return f"; did you mean {near[0]}?" if near else ""


def _target_hyperparameters(target: Setting | None) -> set[str]:
    from qtarget.cli.options.declared import UndeclaredError, declared_target

    try:
        parts = str(target.value).split("+") if target is not None else []
        return {name for part in parts for name in declared_target(part)}
    except (QTargetError, UndeclaredError):
        return set()


def find_path(key: str, value: str, folder: Path) -> str:
    """``value`` beside the config file if it is there, else from the current folder; else a hub name, unchanged.

    Raises:
        ConfigError: a model that can only be a path is nowhere.
    """
    relative = Path(value).expanduser()
    found = next((c.resolve() for c in (folder / relative, relative) if c.exists()), None)
    if found is not None:
        return str(found)
    is_model = key in ("reference", "teacher") or key.endswith("model_name_or_path")
    if is_model and (words := missing_folder(value, (folder, Path()))) is not None:
        raise ConfigError(f"{key}: {words}")
    return value


def find_files(key: str, value: str | list[str], folder: Path) -> str | list[str]:
    """``find_path`` of one or several files; a pattern counts as found where it matches a file."""
    if isinstance(value, list):
        return [str(find_files(key, item, folder)) for item in value]
    beside = str(folder.resolve() / Path(value).expanduser())
    if glob.has_magic(value) and not Path(value).exists() and glob.glob(beside, recursive=True):
        return beside
    return find_path(key, value, folder)


def field_types(cls: Any) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, choices)."""
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata.get("choices")) for f in fields(cls) if f.init}


def _build(cls: Any, given: Mapping[str, Any], path: Path) -> Any:
    mine = {key: value for key, value in given.items() if key in field_types(cls)}
    try:
        return cls(**mine)
    except QTargetError:
        raise
    # TRL and transformers raise any of these for what other keys, packages or the machine do not allow
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        hint = "; `bf16: false` computes in float32, also without a GPU" if "bf16" in str(error) else ""
        raise ConfigError(f"{path}: {cls.__name__} refuses this combination: {error}{hint}") from error


def resolved_settings(config: RunConfig) -> dict[str, Any]:
    """Every setting of a run that YAML can hold: what was given, and TRL's defaults of this version.

    Loading the result gives the same run; secrets are left out.
    """
    out: dict[str, Any] = {}
    for part in (config.training, config.model, config.data, *config.parts):
        for f in fields(part):  # pyright: ignore[reportArgumentType]
            if f.name in SECRET_KEYS or not f.init:
                continue
            # __post_init__ rewrites some fields into what it would not accept again, so a default is kept as written
            default = f.default if f.default_factory is MISSING else f.default_factory()
            value = config.given.get(f.name, default)
            if _is_plain(value):
                out[f.name] = value
    return out


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)
