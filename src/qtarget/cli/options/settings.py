"""YAML and ``--key value`` overrides as one mapping; values checked against annotated types. Nothing heavy here."""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from qtarget.core.errors import ConfigError
from qtarget.storage.files import read_small


@dataclass(frozen=True)
class Setting:
    """One value and where it came from; ``text`` is what the user typed, known for overrides only."""

    value: Any
    origin: str
    text: str | None = None


MOST_VALUES = 1_000_000
"""In one YAML text; aliases of aliases make billions out of a few lines."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: ``1e-4`` is a number and ``no`` is text (YAML 1.1 has it the other way); no key twice."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _count(node: Any, known: dict[int, int | None]) -> int:
    """Values below a node, each alias counted as what it stands for.

    Raises:
        ConstructorError: there are too many, or a value lies in itself.
    """
    children = getattr(node, "value", None)
    if not isinstance(children, list):
        return 1
    if id(node) not in known:
        known[id(node)] = None  # being counted
        parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_count(part, known) for part in parts)
    count = known[id(node)]
    if count is None or count > MOST_VALUES:
        what = "a value lies in itself" if count is None else f"aliases (*name) make more than {MOST_VALUES:,} values"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    return count


# without 1.1's words for these; dates stay text, as 1.2 has none
_RESOLVERS = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_implicit_resolvers = _RESOLVERS
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def parse_yaml(text: str) -> Any:
    """YAML with 1.2 scalars.

    Example:
        >>> parse_yaml("{learning_rate: 1e-4, eval_strategy: no, packing: true}")
        {'learning_rate': 0.0001, 'eval_strategy': 'no', 'packing': True}
    """
    return yaml.load(text, Loader=_Loader)


def is_said(context: Any, name: str) -> bool:
    """Whether an option of a verb stands on the command line, by its Python name."""
    # by the source's name: typer 0.27 may bring a click of its own
    return getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"


def read_settings(path: Path, overrides: Sequence[str]) -> dict[str, Setting]:
    """The config file's keys, then the overrides on top.

    Raises:
        ConfigError: no such file, broken YAML (with its line), no mapping at the top, or broken overrides.
    """
    if path.is_dir():
        from qtarget.data.files import pattern_of

        raise ConfigError(
            f"{path} is a folder; the config comes first: qtarget VERB CONFIG.yaml --key value. Rows of a folder are named "
            f"there by a pattern, for instance `train_file: {pattern_of(path)}`"
        )
    if not path.is_file():
        raise ConfigError(f"{path} is not a file; the config comes first: qtarget VERB CONFIG.yaml --key value")
    try:
        content = parse_yaml(read_small(path).decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); expected a YAML file") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, expected `key: value` lines such as `target: sft`")
    return {str(key): Setting(value, str(path)) for key, value in content.items()} | parse_overrides(overrides)


def parse_overrides(arguments: Sequence[str]) -> dict[str, Setting]:
    """``--key value``, ``--key=value``, ``--key several values`` (a list of settings) and bare ``--flag`` (true), as YAML.

    Raises:
        ConfigError: a value without a key, or a value that is not YAML.

    Example:
        >>> {key: s.value for key, s in parse_overrides(["--learning-rate", "1e-4", "--packing"]).items()}
        {'learning_rate': 0.0001, 'packing': True}
    """
    settings: dict[str, Setting] = {}
    rest = list(arguments)
    while rest:
        option = rest.pop(0)
        if not option.startswith("--") or option == "--":
            pattern = "; a pattern of files stands in quotes: 'rows/*.jsonl'" if _is_file(option) else ""
            raise ConfigError(f"{option!r} belongs to no key; expected --key value or --key=value{pattern}")
        name, equals, text = option[2:].partition("=")
        if not equals:
            # one dash may begin a value: -1
            text = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
        texts = [text]
        while not equals and rest and not rest[0].startswith("--"):  # a list, as TRL takes it
            texts.append(rest.pop(0))
        items = [_override(name, item) for item in texts]
        settings[name.replace("-", "_")] = items[0] if len(items) == 1 else Setting(items, "the command line")
    return settings


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file's name can be
        return False


def _override(name: str, text: str) -> Setting:
    try:
        return Setting(parse_yaml(text), "the command line", text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--{name} {text!r} is not valid YAML ({error}); quote it for the shell") from error


def coerce(key: str, setting: Setting, hint: Any, choices: Sequence[Any] | None = None) -> Any:
    """The value as the annotated type, or an error that names key, value and type. Lossless conversions only.

    Args:
        hint: a resolved annotation: scalars, ``None``, ``list[...]``, ``dict``, ``Literal``, enums and unions.
        choices: the allowed values, where the field lists them.

    Raises:
        ConfigError: the value does not fit.
    """
    options = _options(hint)
    if isinstance(setting.value, list) and any(isinstance(item, Setting) for item in setting.value):
        if not _lists(options):
            found = " ".join(str(item.text) for item in setting.value)
            raise ConfigError(f"--{key} {found}: {key} takes one value, expected {describe(hint)}")
    elif _is_one(setting) and _lists(options) and not {str, dict} & set(options):
        # one value of a list, as TRL takes it; null and [a, b] are what they are
        setting = (
            setting if setting.value is None or isinstance(setting.value, list) else Setting([setting], setting.origin)
        )
    try:
        value = _fit(setting, options)
    except ValueError as error:
        reason = f" ({error})" if str(error) else ""
        raise ConfigError(
            f"{key} is {setting.value!r} in {setting.origin}, expected {describe(hint)}{reason}"
        ) from None
    if choices and value is not None and value not in choices:
        raise ConfigError(f"{key} is {value!r} in {setting.origin}, expected one of {', '.join(map(str, choices))}")
    return value


def _is_one(setting: Setting) -> bool:
    """Whether it may be one value of a list: of the command line anything, of a file a text that joins none."""
    return setting.text is not None or (isinstance(setting.value, str) and "," not in setting.value)


def describe(hint: Any) -> str:
    """A type in words.

    Example:
        >>> describe(int | None)
        'an integer, or null'
    """
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        dict: "a mapping",
        type(None): "null",
    }
    described: list[str] = []
    for option in _options(hint):
        if option is str and any(word.startswith("one of") for word in described):
            continue
        if isinstance(option, type) and issubclass(option, enum.Enum):
            described.append("one of " + ", ".join(str(member.value) for member in option))
        elif typing.get_origin(option) is Literal:
            described.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif typing.get_origin(option) is list or option is list:
            inner = typing.get_args(option)
            described.append("a list" + (f" ({describe(inner[0])})" if inner else ""))
        else:
            described.append(words.get(typing.get_origin(option) or option, getattr(option, "__name__", str(option))))
    return ", or ".join(sorted(described, key=lambda word: word == "null"))


def _lists(options: tuple[Any, ...]) -> bool:
    return any((typing.get_origin(option) or option) is list for option in options)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fit(setting: Setting, options: tuple[Any, ...]) -> Any:
    value = setting.value
    if Any in options or (value is None and type(None) in options):
        return value
    enums = [option for option in options if isinstance(option, type) and issubclass(option, enum.Enum)]
    if enums:  # such fields are annotated `Enum | str`, and the text must still be one of the members
        text = setting.text if setting.text is not None else value
        if not isinstance(text, str) or text not in {member.value for option in enums for member in option}:
            raise ValueError
        return text
    scalars = {bool, int, float, str} & set(options)
    if isinstance(value, dict) and any((typing.get_origin(o) or o) is dict for o in options):
        return value
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if isinstance(value, list) and (typing.get_origin(option) or option) is list:
            inner = (typing.get_args(option) or (Any,))[0]
            items = [item if isinstance(item, Setting) else Setting(item, setting.origin) for item in value]
            return [_fit(item, _options(inner)) for item in items]
    if (
        isinstance(value, str)
        and any((typing.get_origin(o) or o) is dict for o in options)
        and value.lstrip()[:1] == "{"
    ):
        return json.loads(value)  # json.JSONDecodeError is a ValueError
    return _scalar(setting, scalars)


def _scalar(setting: Setting, wanted: set[Any]) -> Any:
    value = setting.value
    # first, because true is an integer in Python
    if isinstance(value, bool):
        if bool in wanted:
            return value
    elif isinstance(value, int) and int in wanted:
        return value
    elif isinstance(value, int | float) and float in wanted:
        return float(value)
    elif isinstance(value, str):
        if str in wanted:
            return value
        if bool in wanted and value.lower() in ("yes", "on", "no", "off"):
            return value.lower() in ("yes", "on")
    # `--run-name 1e3` names a run: as it was typed, not as YAML reads it
    if str in wanted and setting.text is not None:
        return setting.text
    if str in wanted and isinstance(value, int | float):
        raise ValueError("put the value in quotes")
    raise ValueError


SFT, RL = "sft", "rl"
"""Values of the key ``algorithm``: what a config is for, where one verb stands for several."""


def check_algorithm(settings: Mapping[str, Setting], default: str = SFT) -> str:
    """The algorithm of a config.

    Raises:
        ConfigError: another word, or one that the verb does not go with.

    Example:
        >>> check_algorithm({"algorithm": Setting("rl", "run.yaml")})
        'rl'
    """
    if (setting := settings.get("algorithm")) is None:
        return default
    if setting.value not in (SFT, RL):
        raise ConfigError(
            f"algorithm: {setting.value} ({setting.origin}); expected {SFT} (demonstrations) or {RL} (samples of the model's own)"
        )
    if default == RL and setting.value != RL:
        raise ConfigError(
            f"algorithm: {setting.value} ({setting.origin}) is `qtarget train`'s; leave it out, or set {RL}"
        )
    return str(setting.value)
