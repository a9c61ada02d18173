"""A device that is none: numbers lie on the CPU, and tensors say that they lie elsewhere.

torch's own ``meta`` device would do, but its first product imports 900 modules (2.13: two seconds), and it has no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from qtarget.core.shapes import Tensor
from qtarget.core.types import Outcomes, Reference, TokenView

ELSEWHERE = torch.device("meta")
MAY_MIX = ("aten.index.", "aten.index_put", "aten._to_copy", "aten.copy_")
"""Operations that take tensors of the CPU beside those of another device."""


class ElsewhereError(RuntimeError):
    """Tensors of two devices met."""


class Away(Tensor):
    """A tensor of the CPU that says it lies elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Also what makes tensors out of nothing, such as ``torch.zeros(5)``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch 2.13 would import its compiler, two seconds, to keep it out of here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU, its result on the device where it would be.

    Raises:
        ElsewhereError: it takes tensors of both devices, other than single numbers.
    """
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    away = any(isinstance(value, Away) for value in tensors)
    here = any(not isinstance(value, Away) and value.dim() for value in tensors)
    if away and here and not str(func).startswith(MAY_MIX):
        raise ElsewhereError(f"{func} takes one tensor of the view and one that was made on the CPU")
    device = kwargs.get("device")
    goes_away = away if device is None else torch.device(device) == ELSEWHERE
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda value: value.inner if isinstance(value, Away) else value, (args, kwargs))
    found = func(*args, **kwargs)
    return tree_map(lambda value: Away(value) if isinstance(value, Tensor) else value, found) if goes_away else found


@contextmanager
def elsewhere() -> Iterator[None]:
    """Operations inside know the device."""
    with _Everything():
        yield


def moved(view: TokenView) -> TokenView:
    """The view with every tensor elsewhere."""

    def one(value: Any) -> Any:
        if isinstance(value, Outcomes):
            return Outcomes(Away(value.model.detach()), Away(value.frozen))
        if isinstance(value, Reference):
            return value.map_tensors(lambda _, tensor: Away(tensor))
        return Away(value.detach()) if isinstance(value, Tensor) else value

    return replace(view, **{f.name: one(getattr(view, f.name)) for f in fields(view)})
