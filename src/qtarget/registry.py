"""From a name to a target: the files in ``targets`` and ``divergences`` are the registry."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Any

from qtarget import divergences, targets
from qtarget.composed.combined import Combined
from qtarget.core.errors import HyperparameterError, UnknownTargetError
from qtarget.core.types import Target


def available_targets() -> list[str]:
    """Names of the built-in targets and divergences, sorted.

    Example:
        >>> import qtarget
        >>> "dft" in qtarget.available_targets()
        True
    """
    packages = (targets, divergences)
    return sorted(m.name for package in packages for m in pkgutil.iter_modules(package.__path__))


def target_class(name: str) -> type[Target]:
    """The class behind a built-in name or ``package.module:Class``.

    Raises:
        UnknownTargetError: with the nearest known names.
    """
    if ":" in name:
        return _outside_class(name)
    if name not in available_targets():
        near = difflib.get_close_matches(name, available_targets(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownTargetError(
            f"target {name!r} is unknown; {hint}`qtarget targets` lists all; your own is given as package.module:Class"
        )
    package = targets if name in {m.name for m in pkgutil.iter_modules(targets.__path__)} else divergences
    module = importlib.import_module(f"{package.__name__}.{name}")
    classes: list[type[Target]] = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Target)]
    return next(c for c in classes if getattr(c, "name", None) == name)


def load_outside(name: str, what: str = "target", expected: str = "package.module:Class") -> Any:
    """The object behind ``package.module:name`` (or ``package.module:Class.method``); runs that module's code.

    Raises:
        UnknownTargetError: there is no such module, or nothing of that name in it, or its code raises or exits.
    """
    module_name, _, path = name.partition(":")
    try:
        return operator.attrgetter(path)(importlib.import_module(module_name))
    except (Exception, SystemExit) as error:  # the module's own code runs here, and may raise anything
        raise UnknownTargetError(
            f"{what} {name!r} cannot be imported ({type(error).__name__}: {error}); expected {expected}"
        ) from error


def _outside_class(name: str) -> type[Target]:
    found = load_outside(name)
    if not (inspect.isclass(found) and issubclass(found, Target)) or inspect.isabstract(found):
        raise UnknownTargetError(f"{name!r} is not a concrete subclass of qtarget.Target")
    return found


def hyperparameters(cls: type[Target]) -> dict[str, Any]:
    """Names and defaults of a target's hyper-parameters."""
    return {f.name: f.default for f in fields(cls)} if is_dataclass(cls) else {}


def get_target(name: str, **hyperparameters_: Any) -> Target:
    """A target by name.

    ``"weight+base"`` combines: the weight multiplies the base's pull towards the observed token and leaves its
    residual as it is (``qtarget.Combined``). Hyper-parameters go to whichever part knows them.

    Raises:
        UnknownTargetError: no such name.
        HyperparameterError: a hyper-parameter is unknown, ambiguous or out of range.
        IncompatibleError: the two parts have no meaning together.

    Example:
        >>> import qtarget
        >>> qtarget.get_target("p_power", alpha=0.5)
        PPower(alpha=0.5)
        >>> qtarget.get_target("prior_surprise+label_smoothing", smoothing=0.2).name
        'prior_surprise+label_smoothing'
    """
    classes = [target_class(part) for part in name.split("+")]
    if len(classes) > 2:
        raise UnknownTargetError(f"{name!r} combines {len(classes)} targets; expected weight+base")
    chosen: list[dict[str, Any]] = [{} for _ in classes]
    for key, value in hyperparameters_.items():
        owners = [i for i, cls in enumerate(classes) if key in hyperparameters(cls)]
        if len(owners) != 1:
            known = sorted({k for cls in classes for k in hyperparameters(cls)})
            what = "belongs to both parts; build qtarget.Combined(weight, base)" if owners else "is unknown"
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near and not owners else ""
            raise HyperparameterError(
                f"hyper-parameter {key!r} {what} for target {name!r}{hint}; known: {', '.join(known) or 'none'}"
            )
        chosen[owners[0]][key] = value
    built = [cls(**kwargs) for cls, kwargs in zip(classes, chosen, strict=True)]
    return built[0] if len(built) == 1 else Combined(*built)
