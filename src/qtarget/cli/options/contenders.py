"""Contenders as people write them: ``dft``, ``label_smoothing(smoothing=0.2)``, ``mine:Target``, or keys of a config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qtarget.cli.options.settings import parse_yaml
from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.comparison.jobs import Contender
    from qtarget.core.types import Target

BASELINE = "sft"
OPEN, CLOSE = "([{", ")]}"
FORM = re.compile(r"(?P<target>[^()]+?)\s*(?:\((?P<keys>.*)\))?")
OWN_KEYS = ("guard",)
"""Keys in parentheses that are the config's and no hyper-parameter."""


def split_outside(text: str) -> list[str]:
    """Parts between commas, those inside brackets left alone.

    Example:
        >>> split_outside("sft, gem(temperature=0.7, top_k=3),dft")
        ['sft', 'gem(temperature=0.7, top_k=3)', 'dft']
    """
    parts, depth = [""], 0
    for character in text:
        depth += (character in OPEN) - (character in CLOSE)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_target(text: str) -> dict[str, Any]:
    """The keys of a config that a contender's text stands for.

    Raises:
        ConfigError: not of this form.

    Example:
        >>> parse_target("label_smoothing(smoothing=0.2)")
        {'target': 'label_smoothing', 'target_kwargs': {'smoothing': 0.2}}
        >>> parse_target("dft(guard=true)")
        {'target': 'dft', 'guard': True}
    """
    match = FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"--targets {text!r}: expected a name, or a name with keys: label_smoothing(smoothing=0.2)")
    keys: dict[str, Any] = {}
    for part in split_outside(match["keys"] or ""):
        name, equals, value = part.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"--targets {text!r}: {part!r} is no key=value")
        keys[name.strip()] = parse_yaml(value)
    own = {name: keys.pop(name) for name in OWN_KEYS if name in keys}
    return {"target": match["target"]} | ({"target_kwargs": keys} if keys else {}) | own


def find_contenders(
    targets: Sequence[str | Mapping[str, Any]], filters: Sequence[Any], config: Mapping[str, Any]
) -> list[Contender]:
    """The baseline first, then what was named, each with each filter.

    Args:
        targets: texts, or keys of a config with an optional ``name``.
        filters: ``none``, ``auto``, another rule, or a mapping as in a config; a bare rule weighs rows where the config's
            filter does.
        config: the file's keys: the hyper-parameters of its own target are that target's here, too.

    Raises:
        ConfigError: a text that is none, an entry without a target, or two of one name.
        UnknownTargetError, HyperparameterError: no such target, or not with these.
    """
    from qtarget.comparison.jobs import Contender
    from qtarget.filtering import Filter

    found = [_entry(one, config) for one in targets]
    filters = [_shaped(rule, config.get("filter")) for rule in filters]
    own = [Contender(name, keys) for name, keys in found if "filter" in keys]
    found = [(name, keys) for name, keys in found if "filter" not in keys]
    named = [
        *(Contender(_with(name, rule), {**keys, "filter": rule}) for rule in filters for name, keys in found),
        *own,
    ]
    for one in named:
        Filter.of(one.overrides["filter"])  # before the base is scored for it
    plain = next(
        (one for one in named if one.name == BASELINE), Contender(BASELINE, {"target": "sft", "filter": "none"})
    )
    named = [plain, *(one for one in named if one is not plain)]
    for one in named:
        if sum(other.name == one.name for other in named) > 1:
            raise ConfigError(f"--targets names {one.name} twice; give an entry under `compare:` a `name` of its own")
        if any(one.overrides == other.overrides for other in named if other is not one):
            raise ConfigError(f"{one.name} is trained twice, under two names; leave one out")
    return named


def _shaped(rule: Any, own: Any) -> Any:
    """A rule in the form of the config's own filter: rows that it weighs are weighed under another rule, too.

    Example:
        >>> _shaped("agreement", {"rule": "auto", "as": "weight"}), _shaped("none", {"as": "weight"}), _shaped("auto", "gain")
        ({'rule': 'agreement', 'as': 'weight'}, 'none', 'auto')
    """
    weighs = isinstance(own, Mapping) and own.get("as") == "weight"
    return {"rule": rule, "as": "weight"} if weighs and isinstance(rule, str) and rule != "none" else rule


def _with(name: str, rule: Any) -> str:
    """A contender's name with what is done to its rows.

    Example:
        >>> _with("sft", "none"), _with("sft", "gain"), _with("sft", {"as": "weight"}), _with("sft", {"keep": 0.5})
        ('sft', 'sft, filtered gain', 'sft, weighed', 'sft, filtered keep 0.5')
    """
    from qtarget.filtering import Filter

    if not (found := Filter.of(rule)):
        return name
    told = [] if found.rule == "auto" else [found.rule]
    told += [] if found.keep is None else [f"keep {found.keep:g}"]
    return f"{name}, {' '.join(['weighed' if found.form == 'weight' else 'filtered', *told])}"


def _entry(one: str | Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    from qtarget.registry import get_target

    if isinstance(one, Mapping):
        keys = dict(one)
        name = str(keys.pop("name", "") or _described(keys))
    else:
        name, keys = one, parse_target(one)
    refuse_fixed(name, keys)
    if "target" not in keys and not config.get("target"):
        raise ConfigError(f"compare: {one} names no target")
    keys = {"target": config.get("target")} | keys
    same = keys["target"] == config.get("target")
    for key in ("target_kwargs", "guard"):  # of the file's own target, unless this one says otherwise
        keys.setdefault(key, config.get(key) if same else None)
    keys["guard"] = bool(keys["guard"])
    get_target(str(keys["target"]), **(keys["target_kwargs"] or {}))
    return name, keys


def refuse_fixed(name: str, keys: Mapping[str, Any]) -> None:
    """A contender of other rows, steps or seeds would differ by more than its target; a rate of its own would never be used.

    Raises:
        ConfigError: names the keys.
    """
    from dataclasses import fields

    from qtarget.cli.options.config import DataConfig
    from qtarget.comparison.jobs import fixed_keys

    fixed = fixed_keys() | {field.name for field in fields(DataConfig)}
    if own := sorted(fixed & set(keys)):
        raise ConfigError(
            f"compare: {name} has {', '.join(own)} of its own; rows, model, steps and seeds are alike for all, and rates are tried "
            "for each (--rates)"
        )


def _described(keys: Mapping[str, Any]) -> str:
    others = [f"{key}={value}" for key, value in keys.items() if key != "target"]
    return str(keys.get("target", "")) + (f" ({', '.join(others)})" if others else "")


def named_targets(text: str, known: Mapping[str, Callable[[], tuple[str, Target]]]) -> dict[str, Target]:
    """Targets by the name they are shown under.

    Args:
        text: names apart by commas, hyper-parameters in brackets.
        known: names that stand for a target with hyper-parameters; each gives its label and the target.

    Raises:
        ConfigError: brackets that do not close, or values that are no ``key=value``.
        UnknownTargetError, HyperparameterError: as for ``qtarget train``.
    """
    from qtarget.composed.guarded import Guarded
    from qtarget.registry import get_target

    out: dict[str, Target] = {}
    for part in split_outside(text):
        if part in known:
            label, target = known[part]()
        else:
            keys = parse_target(part)
            label, target = part, get_target(keys["target"], **keys.get("target_kwargs", {}))
            target = Guarded(target) if keys.get("guard") else target
        out[label] = target
    return out
