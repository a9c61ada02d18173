"""qtarget: choose, per token, what distribution a language model is pulled towards.

Every public name is imported when it is asked for (PEP 562): ``import qtarget`` loads nothing, the core needs torch and
numpy only, and ``QTargetTrainer`` and ``QTargetConfig`` need the ``train`` extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtarget.api import explain_backend, label_weights, linear_target_loss, target_loss
    from qtarget.composed.combined import Combined
    from qtarget.composed.guarded import Guarded
    from qtarget.composed.regularised import Regularised
    from qtarget.composed.taught import Taught
    from qtarget.contract.check import check_target
    from qtarget.core.errors import QTargetError
    from qtarget.core.induced import InducedTarget, induced_target
    from qtarget.core.statistics import token_statistics
    from qtarget.core.types import FrozenHead, LabelWeight, Needs, Outcomes, Reference, Target, Terms, TokenView
    from qtarget.integrations.rl.config import QTargetGRPOConfig as QTargetGRPOConfig
    from qtarget.integrations.rl.trainer import QTargetGRPOTrainer as QTargetGRPOTrainer
    from qtarget.integrations.sft.config import QTargetConfig as QTargetConfig
    from qtarget.integrations.sft.trainer import QTargetTrainer as QTargetTrainer
    from qtarget.loss.backends import BackendChoice
    from qtarget.loss.result import TokenReport
    from qtarget.registry import available_targets, available_trust_regions, get_target

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
    "Regularised",
    "Target",
    "Taught",
    "Terms",
    "TokenReport",
    "TokenView",
    "available_targets",
    "available_trust_regions",
    "check_target",
    "explain_backend",
    "get_target",
    "induced_target",
    "label_weights",
    "linear_target_loss",
    "target_loss",
    "token_statistics",
]

_MODULES = {
    "api": ("explain_backend", "label_weights", "linear_target_loss", "target_loss"),
    "composed.combined": ("Combined",),
    "composed.guarded": ("Guarded",),
    "composed.regularised": ("Regularised",),
    "composed.taught": ("Taught",),
    "contract.check": ("check_target",),
    "core.errors": ("QTargetError",),
    "core.induced": ("InducedTarget", "induced_target"),
    "core.statistics": ("token_statistics",),
    "core.types": ("FrozenHead", "LabelWeight", "Needs", "Outcomes", "Reference", "Target", "Terms", "TokenView"),
    "loss.backends": ("BackendChoice",),
    "loss.result": ("TokenReport",),
    "registry": ("available_targets", "available_trust_regions", "get_target"),
    "integrations.rl.config": ("QTargetGRPOConfig",),
    "integrations.rl.trainer": ("QTargetGRPOTrainer",),
    "integrations.sft.config": ("QTargetConfig",),
    "integrations.sft.trainer": ("QTargetTrainer",),
}
"""Where public names live, as the imports above say it to type checkers; those of ``integrations`` are no part of
``__all__``, so that a star import works without the extra."""
_LAZY = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __name__:  # a fault of ours, and nothing to install
            raise
        package = "'qtarget[train]'" if name not in __all__ else missing
        raise ImportError(f"{__name__}.{name} needs {missing}: pip install {package}", name=missing) from error
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted([*_LAZY, "__all__", "__version__"])
