"""From a name to a target: the files in ``targets``, ``divergences`` and ``trust_regions`` are the registry."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import pkgutil
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from qtarget import divergences, targets, trust_regions
from qtarget.core.errors import (
    HyperparameterError,
    QTargetError,
    UnknownNameError,
    UnknownTargetError,
    UnknownTrustRegionError,
)

# no torch here: the command line lists and refuses names before anything heavy is loaded
if TYPE_CHECKING:
    from qtarget.core.types import Target


def available_targets() -> list[str]:
    """Names of the built-in targets and divergences, sorted.

    Example:
        >>> import qtarget
        >>> "dft" in qtarget.available_targets()
        True
    """
    return sorted([*_files(targets), *_files(divergences)])


def available_trust_regions() -> list[str]:
    """Names of the built-in rules for samples of one's own, sorted.

    Example:
        >>> import qtarget
        >>> "dppo_tv" in qtarget.available_trust_regions()
        True
    """
    return _files(trust_regions)


def _files(package: Any) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def target_class(name: str) -> type[Target]:
    """The class behind a built-in name or ``package.module:Class``.

    Raises:
        UnknownTargetError: with the nearest known names.
    """
    from qtarget.core.types import Target

    if ":" in name:
        return _outside_class(name)
    module = importlib.import_module(module_of(name))
    classes: list[type[Target]] = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Target)]
    return next(c for c in classes if getattr(c, "name", None) == name)


def module_of(name: str) -> str:
    """The module that holds a built-in target; nothing is imported.

    Raises:
        UnknownTargetError: with the nearest known names.

    Example:
        >>> module_of("dft")
        'qtarget.targets.dft'
    """
    known = [*available_targets(), *available_trust_regions()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownTargetError(
            f"target {name!r} is unknown; {hint}`qtarget targets` lists all; your own is given as package.module:Class"
        )
    package = next(p for p in (targets, divergences, trust_regions) if name in _files(p))
    return f"{package.__name__}.{name}"


def check_names(name: str) -> None:
    """Raise for a built-in name that is none, in ``name`` or ``weight+base``; nothing is imported.

    Raises:
        UnknownTargetError: with the nearest known names.
    """
    for part in name.split("+"):
        if ":" not in part:
            module_of(part)


def load_outside(name: str, what: str = "target", expected: str = "package.module:Class") -> Any:
    """The object behind ``package.module:name`` (or ``package.module:Class.method``); runs that module's code.

    Raises:
        UnknownNameError: there is no such module, or nothing of that name in it, or its code raises or exits; of a target an
            ``UnknownTargetError``.
    """
    unknown = UnknownTargetError if what == "target" else UnknownNameError
    module_name, _, path = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module's own code runs here, and may raise anything
        own = isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.partition(".")[0])
        hint = f"; is {own_file(module_name, expected.rpartition(':')[2])} in the current folder?" if own else ""
        raise unknown(
            f"{what} {name!r} cannot be imported ({type(error).__name__}: {error}); expected {expected}{hint}"
        ) from error
    try:
        return operator.attrgetter(path)(module)
    except AttributeError as error:
        near = difflib.get_close_matches(path, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise unknown(
            f"{what} {name!r} cannot be imported: {getattr(module, '__file__', None) or module_name} has no {path!r}; expected "
            f"{expected}{hint}"
        ) from error


def own_file(module: str, what: str = "Class") -> str:
    """The file that a module of the user's would be in.

    Args:
        what: is looked for in it.

    Example:
        >>> own_file("targets.mine"), own_file("mine.py", "function")
        ('targets/mine.py', 'mine.py (write mine:function, without .py)')
    """
    if module.endswith(".py"):
        return f"{module} (write {module.removesuffix('.py')}:{what}, without .py)"
    return module.replace(".", "/") + ".py"


def _outside_class(name: str) -> type[Target]:
    from qtarget.core.types import Target

    found = load_outside(name)
    if not inspect.isclass(found):
        loss = f"; a loss function of (logits, labels) is drawn by `qtarget lens {name}`" if callable(found) else ""
        raise UnknownTargetError(
            f"{name!r} is a {type(found).__name__}, not a concrete subclass of qtarget.Target; write a class "
            f"(`qtarget targets new NAME` starts one){loss}"
        )
    if not issubclass(found, Target):
        bases = ", ".join(base.__name__ for base in found.__bases__)
        raise UnknownTargetError(
            f"{name!r} is not a concrete subclass of qtarget.Target but of {bases}; derive it from qtarget.LabelWeight (a weight "
            "on the observed token) or qtarget.Target"
        )
    if missing := sorted(found.__abstractmethods__):
        raise UnknownTargetError(
            f"{name!r} is not a concrete subclass of qtarget.Target: it lacks {', '.join(missing)}; write the method"
        )
    return found


def hyperparameters(cls: type[Target]) -> dict[str, Any]:
    """Names and defaults of a target's hyper-parameters."""
    return {f.name: f.default for f in fields(cls)} if is_dataclass(cls) else {}


def get_target(name: str, **hyperparameters_: Any) -> Target:
    """A target by name.

    ``"weight+base"`` combines: the weight multiplies the base's pull towards the observed token and leaves its
    residual as it is (``qtarget.Combined``). Hyper-parameters go to whichever part knows them.

    Raises:
        UnknownTargetError: no such name, or no name.
        HyperparameterError: a hyper-parameter is unknown, ambiguous or out of range.
        IncompatibleError: the two parts have no meaning together.
        ContractError: a target of the user's breaks the contract (``qtarget.check_target``).

    Example:
        >>> import qtarget
        >>> qtarget.get_target("p_power", alpha=0.5)
        PPower(alpha=0.5)
        >>> qtarget.get_target("prior_surprise+label_smoothing", smoothing=0.2).name
        'prior_surprise+label_smoothing'
    """
    from qtarget.composed.combined import Combined

    if not isinstance(name, str):  # typed, but Python users hand over what they have
        raise UnknownTargetError(
            f"target is {name!r}; expected its name: one of `qtarget targets`, or 'module:Class' with target_kwargs"
        )
    classes = [target_class(part) for part in name.split("+")]
    if len(classes) > 2:
        raise UnknownTargetError(f"{name!r} combines {len(classes)} targets; expected weight+base")
    chosen: list[dict[str, Any]] = [{} for _ in classes]
    for key, value in hyperparameters_.items():
        bare = any(key in getattr(cls, "__annotations__", {}) for cls in classes)
        chosen[owner_of(key, name, [hyperparameters(cls) for cls in classes], bare=bare)][key] = value
    built = [_built(*made) for made in zip(name.split("+"), classes, chosen, strict=True)]
    return built[0] if len(built) == 1 else Combined(*built)


def get_trust_region(name: str, **hyperparameters_: Any) -> Target:
    """``get_target`` of what is asked for as a rule for samples; whether it is one, the caller says.

    Raises:
        UnknownTrustRegionError: no such name, with the nearest rules.
        HyperparameterError, IncompatibleError, ContractError: see ``get_target``.
    """
    regions = available_trust_regions()
    if ":" not in name and name not in (*regions, *available_targets()):
        longer = [region for region in regions if region.startswith(name)]
        near = list(dict.fromkeys([*longer, *difflib.get_close_matches(name, regions, n=3)]))
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(regions)}"
        raise UnknownTrustRegionError(
            f"trust_region {name!r} is unknown; {hint} `qtarget targets` explains them; your own is given as "
            "package.module:Class"
        )
    return get_target(name, **hyperparameters_)


def owner_of(key: str, name: str, known: Sequence[Collection[str]], *, bare: bool = False) -> int:
    """Which part of a target a hyper-parameter belongs to.

    Args:
        known: names of each part's hyper-parameters.
        bare: whether a part's class has such an annotation, which is no hyper-parameter unless a dataclass makes it one.

    Raises:
        HyperparameterError: to none, or to both.
    """
    owners = [i for i, part in enumerate(known) if key in part]
    if len(owners) == 1:
        return owners[0]
    names = sorted({name for part in known for name in part})
    what = "belongs to both parts; build qtarget.Combined(weight, base)" if owners else "is unknown"
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"; did you mean {near[0]}?" if near and not owners else ""
    if bare and not owners:
        hint = "; it stands in the class, so write @dataclass(frozen=True) above the class"
    raise HyperparameterError(
        f"hyper-parameter {key!r} {what} for target {name!r}{hint}; known: {', '.join(names) or 'none'}"
    )


def _built(name: str, cls: type[Target], kwargs: dict[str, Any]) -> Target:
    """The target; one of the user's own is checked."""
    from qtarget.contract.check import check_target

    if ":" not in name:
        return cls(**kwargs)
    try:
        target = cls(**kwargs)
    except QTargetError:
        raise
    except Exception as error:  # the user's own code
        raise HyperparameterError(f"target {name!r} refuses {kwargs or 'its defaults'}: {error}") from error
    check_target(target)
    return target
