"""qtarget: choose, per token, what distribution a language model is pulled towards."""

from qtarget.api import explain_backend, label_weights, linear_target_loss, target_loss
from qtarget.combined import Combined
from qtarget.errors import QTargetError
from qtarget.guarded import Guarded
from qtarget.induced import InducedTarget, induced_target
from qtarget.loss.backends import BackendChoice
from qtarget.loss.result import TokenReport
from qtarget.registry import available_targets, get_target
from qtarget.statistics import token_statistics
from qtarget.types import FrozenHead, LabelWeight, Needs, Outcomes, Reference, Target, Terms, TokenView

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
