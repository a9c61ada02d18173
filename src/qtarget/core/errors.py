"""Every error qtarget raises on purpose: one root, and each is also the built-in error one would expect.

A message says what is wrong, what was expected, and the next step. How it counts things stands at the end.
"""

from __future__ import annotations


class QTargetError(Exception):
    """Root of all errors that qtarget raises on purpose."""


class UnknownNameError(QTargetError, LookupError):
    """Nothing goes by this name, or no ``package.module:function`` can be imported by it."""


class UnknownTargetError(UnknownNameError):
    """No target, divergence or ``package.module:Class`` goes by this name."""


class UnknownTrustRegionError(UnknownNameError):
    """No trust region goes by this name."""


class HyperparameterError(QTargetError, ValueError):
    """A hyper-parameter is unknown to the target or outside its range."""


class MissingStatisticError(QTargetError, ValueError):
    """The target needs a number of the frozen model that was not given."""


class ShapeError(QTargetError, ValueError):
    """Tensors do not line up."""


class IncompatibleError(QTargetError, ValueError):
    """Two choices that have no meaning together."""


class CacheMismatchError(QTargetError, ValueError):
    """A reference cache was made from other rows, another model, tokenizer or template."""


class DataError(QTargetError, ValueError):
    """The training rows are unusable as they are."""


class ConfigError(QTargetError, ValueError):
    """The training configuration is wrong."""


class ContractError(ConfigError):
    """A target of the user's own does not keep what a target promises."""


class RewardError(QTargetError, ValueError):
    """A reward function raised, or returned what is no reward."""


class ResumeError(ConfigError):
    """A checkpoint is damaged, or of another run than the one that is to go on from it."""


class UnsupportedModelError(QTargetError, TypeError):
    """The model's head is not one the loss knows how to apply."""


class NonFiniteLossError(QTargetError, FloatingPointError):
    """The loss became NaN or infinite."""


class LossUnderLensError(QTargetError, TypeError):
    """A loss given to the lens cannot be called with logits and labels, or not be differentiated."""


class StorageError(QTargetError, OSError):
    """A file could not be written."""


class MissingDependencyError(QTargetError, ImportError):
    """An optional package is needed for what was asked."""


class ScoringServerError(QTargetError, ConnectionError):
    """A scoring server cannot be reached, refuses, answers nonsense, or serves another model than was named."""


class ServingError(QTargetError, RuntimeError):
    """A scoring server does not start, or failed too often to go on."""


IRREGULAR = {"have": "has", "are": "is", "do": "does", "were": "was"}


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """So many of a thing.

    Args:
        plural: of the noun, where it is not the noun with an s.

    Example:
        >>> counted(1, "row"), counted(2000, "row"), counted(0, "copy", "copies")
        ('1 row', '2,000 rows', '0 copies')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def inflected(count: int, verb: str) -> str:
    """What so many things do.

    Args:
        verb: of several, in the present.

    Example:
        >>> inflected(1, "have"), inflected(3, "have"), inflected(1, "hold")
        ('has', 'have', 'holds')
    """
    return verb if count != 1 else IRREGULAR.get(verb, f"{verb}s")
