"""qtarget: choose, per token, what distribution a language model is pulled towards."""

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
