"""Fields of a dataclass as its source declares them, without importing it: transformers and TRL take seconds to import.

Nothing of a module runs but the small expressions that are asked for: annotations, defaults and choices.
"""

from __future__ import annotations

import ast
import builtins
import enum
import importlib.util
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qtarget.registry import module_of

UNKNOWN: Any = Any
"""Type of what this reading does not understand: every value will do."""


class UndeclaredError(LookupError):
    """The source has no such class, or is nowhere."""


@dataclass(frozen=True)
class Declared:
    """One field: its annotation, its choices where it lists them, and its default; ``MISSING`` where that is unknown."""

    hint: Any
    choices: Any
    default: Any


def declared_fields(module: str, name: str) -> dict[str, Declared]:
    """Fields that ``__init__`` takes, those of the bases first.

    Raises:
        UndeclaredError: the class or one of its bases cannot be found, so some field may be missing.

    Example:
        >>> fields = declared_fields("qtarget.targets.gem", "GEM")
        >>> {key: field.default for key, field in fields.items()}
        {'temperature': 0.7, 'form': 'linear'}
    """
    return dict(_fields(module, name))


def declared_target(name: str) -> dict[str, Declared]:
    """Hyper-parameters of a target: a built-in name, or ``module:Class``.

    Raises:
        UnknownTargetError: no such built-in.
        UndeclaredError: the module is not found here.

    Example:
        >>> sorted(declared_target("eaft"))
        ['alpha', 'top_k']
    """
    module, _, path = name.partition(":") if ":" in name else (module_of(name), "", "")
    for line in _tree(module).body:
        if isinstance(line, ast.ClassDef) and (line.name == path or (not path and _called(line) == name)):
            return declared_fields(module, line.name)
    raise UndeclaredError(f"{module} has no class for {name}")


def _called(node: ast.ClassDef) -> Any:
    """The ``name`` that stands in a class."""
    named = (line for line in node.body if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name")
    return next((ast.literal_eval(line.value) for line in named), None)


@cache
def _fields(module: str, name: str) -> Mapping[str, Declared]:
    module, node = _definition(module, name)
    if node is None:
        return {}
    if not isinstance(node, ast.ClassDef):
        raise UndeclaredError(f"{module} declares no class {name}")
    names, found = _Names(module), {}
    for base in node.bases:
        if isinstance(base, ast.Attribute):
            found |= _fields(ast.unparse(base.value), base.attr)
        elif isinstance(base, ast.Name) and base.id not in vars(builtins):
            found |= _fields(module, base.id)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return found
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            found |= _field(line, names)
    return found


def _field(line: ast.AnnAssign, names: _Names) -> dict[str, Declared]:
    hint, default, choices = names.value(line.annotation, UNKNOWN), MISSING, None
    if typing.get_origin(hint) is typing.ClassVar or hint is typing.ClassVar:
        return {}
    if isinstance(line.value, ast.Call) and ast.unparse(line.value.func).endswith("field"):
        given = {word.arg: word.value for word in line.value.keywords}
        if "init" in given and names.value(given["init"], True) is False:
            return {}
        default = names.value(given["default"], MISSING) if "default" in given else MISSING
        for key, value in _items(given.get("metadata")):
            if names.value(key, None) == "choices":
                choices = names.value(value, None)
    elif line.value is not None:
        default = names.value(line.value, MISSING)
    assert isinstance(line.target, ast.Name)
    return {line.target.id: Declared(hint, choices, default)}


def _items(node: ast.AST | None) -> list[tuple[ast.expr, ast.expr]]:
    if not isinstance(node, ast.Dict):
        return []
    return [(key, value) for key, value in zip(node.keys, node.values, strict=True) if key is not None]


class _Names(dict):
    """Names as a module would see them, looked up when an expression uses them."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def value(self, node: ast.expr, otherwise: Any) -> Any:
        """What an expression says, or ``otherwise`` where that takes more than names, literals and types."""
        try:
            return eval(compile(ast.Expression(node), self.module, "eval"), {"__builtins__": {}}, self)
        except Exception:  # names of modules that are not read, calls of what is only known as a type
            return otherwise

    def __missing__(self, name: str) -> Any:
        if hasattr(typing, name):
            return getattr(typing, name)
        if name in vars(builtins):
            return getattr(builtins, name)
        module, node = _definition(self.module, name)
        if node is None:
            return UNKNOWN
        if isinstance(node, ast.ClassDef):
            return _enum(_Names(module), node)
        return _Names(module).value(node, UNKNOWN)


def _enum(names: _Names, node: ast.ClassDef) -> Any:
    """An enumeration of texts; other classes are unknown."""
    if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        raise UndeclaredError(node.name)
    lines = [line for line in node.body if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)]
    return enum.Enum(node.name, {ast.unparse(line.targets[0]): names.value(line.value, None) for line in lines})


@cache
def _definition(module: str, name: str) -> tuple[str, Any]:
    """Where a name is defined, and the class or the value there (None in Python's own library); imports are followed."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return module, None
    values = []
    for line in _statements(_tree(module).body):
        if isinstance(line, ast.ClassDef) and line.name == name:
            return module, line
        if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in line.targets):
            values.append(line.value)
        if isinstance(line, ast.ImportFrom):
            for alias in line.names:
                if (alias.asname or alias.name) == name:
                    return _definition(_absolute(module, line), alias.name)
    if len(values) != 1:  # several: it depends on the machine
        raise UndeclaredError(f"{module} has no single {name}")
    return module, values[0]


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module, also under ``if`` and ``try``."""
    for line in body:
        yield line
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(line, ast.If | ast.Try | ast.ExceptHandler):
                yield from _statements(getattr(line, part, ()))


def _absolute(module: str, line: ast.ImportFrom) -> str:
    if not line.level:
        return line.module or ""
    parts = module.split(".")
    is_package = _path(module).name == "__init__.py"
    kept = parts[: len(parts) - line.level + is_package]
    return ".".join([*kept, line.module] if line.module else kept)


@cache
def _tree(module: str) -> ast.Module:
    try:
        return ast.parse(_path(module).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UndeclaredError(f"{module}: {error}") from error


@cache
def _path(module: str) -> Path:
    """The file of a module; only its top-level package is looked for, since looking further would import that."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError) as error:
        raise UndeclaredError(f"{top}: {error}") from error
    if spec is None or spec.origin is None:
        raise UndeclaredError(f"{top} is not installed")
    path = Path(spec.origin).parent.joinpath(*rest) if rest else Path(spec.origin)
    if not rest:
        return path
    return path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")
