"""Weights that DeepSpeed ZeRO-3 has split over processes, made whole while they are read outside its engine.

Inside training its engine gathers them; a model that was loaded under ZeRO-3 is split long before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from qtarget.core.shapes import Tensor


def is_split(weight: Tensor) -> bool:
    """Whether ZeRO-3 holds this weight in pieces."""
    return hasattr(weight, "ds_id")


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of the gathered weight."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def gathered(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Every process sees these weights whole, to read; weights that are not split are left alone.

    All processes must enter it: it communicates.
    """
    split = [weight for weight in weights if is_split(weight)]
    if not split:
        return nullcontext()
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed.zero.GatheredParameters(split)


@contextmanager
def gathered_while_running(model: torch.nn.Module, throughout: torch.nn.Module) -> Iterator[None]:
    """Let a split model run before its engine exists: each module's own weights are whole only while it runs.

    Args:
        model: to run inside the context.
        throughout: one of its modules (the head), whose weights are whole all the time.
    """
    kept = list(throughout.parameters())
    entered: dict[torch.nn.Module, AbstractContextManager[Any]] = {}
    handles = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        # by identity: ``in`` would compare tensors element by element
        entered[module] = gathered(p for p in module.parameters(recurse=False) if not any(p is k for k in kept))
        entered[module].__enter__()

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        entered.pop(module).__exit__(None, None, None)

    for module in model.modules():
        if any(is_split(p) for p in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with gathered(kept):
            yield
    finally:
        for handle in handles:
            handle.remove()
