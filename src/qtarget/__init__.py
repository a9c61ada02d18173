"""qtarget: choose, per token, what distribution a language model is pulled towards.

``QTargetTrainer`` and ``QTargetConfig`` are imported when they are asked for: the core needs torch and numpy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtarget.api import explain_backend, label_weights, linear_target_loss, target_loss
from qtarget.composed.combined import Combined
from qtarget.composed.guarded import Guarded
from qtarget.core.errors import QTargetError
from qtarget.core.induced import InducedTarget, induced_target
from qtarget.core.statistics import token_statistics
from qtarget.core.types import FrozenHead, LabelWeight, Needs, Outcomes, Reference, Target, Terms, TokenView
from qtarget.loss.backends import BackendChoice
from qtarget.loss.result import TokenReport
from qtarget.registry import available_targets, get_target

if TYPE_CHECKING:
    from qtarget.integrations.sft.config import QTargetConfig as QTargetConfig
    from qtarget.integrations.sft.trainer import QTargetTrainer as QTargetTrainer

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "Combined",
    "FrozenHead",
    "Guarded",
    "InducedTarget",
    "LabelWeight",
    "Needs",
    "Outcomes",
    "QTargetError",
    "Reference",
    "Target",
    "Terms",
    "TokenReport",
    "TokenView",
    "available_targets",
    "explain_backend",
    "get_target",
    "induced_target",
    "label_weights",
    "linear_target_loss",
    "target_loss",
    "token_statistics",
]

_LAZY = {
    "QTargetConfig": "qtarget.integrations.sft.config",
    "QTargetTrainer": "qtarget.integrations.sft.trainer",
}
"""Public names that need the ``train`` extra, and where they live (PEP 562); no part of ``__all__``, so that a star
import works without it."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __name__:  # a fault of ours, and nothing to install
            raise
        raise ImportError(f"qtarget.{name} needs {missing}: pip install 'qtarget[train]'", name=missing) from error


def __dir__() -> list[str]:
    return sorted([*__all__, *_LAZY])
