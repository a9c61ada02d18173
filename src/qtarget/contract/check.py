"""Does a target keep the contract? Checked in milliseconds on the CPU, before a model is loaded."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import torch

from qtarget.contract.lines import TRIED
from qtarget.contract.probe import FROZEN, STATISTICS, broken, told
from qtarget.core.types import Needs, Scope, Target

FLAGS = ("has_label_term", "has_residual", "linear_in_frozen", "live_weights")
KNOWN_NEEDS = (*STATISTICS, "reference", "teacher")

_KEPT: set[Target] = set()
"""Targets that were found to keep the contract: a loss that is called at each step pays once."""


def check_target(target: Target) -> None:
    """Raise at the first line of the contract that a target breaks.

    ``get_target`` does it for targets of your own (``module:Class``), and so do the verbs that build one; call it in your
    target's test.

    Raises:
        ContractError: names the line, what came, what was expected, and the next step.

    Example:
        >>> import qtarget
        >>> qtarget.check_target(qtarget.get_target("dft"))
        >>> class Forgetful(qtarget.Target):
        ...     name, formula, paper = "forgetful", "-log p_y", "ours"
        ...     def losses(self, x):
        ...         return -x.label_log_probs
        >>> try:
        ...     qtarget.check_target(Forgetful())
        ... except qtarget.QTargetError as error:
        ...     print(error)
        target 'forgetful' breaks the contract, line "terms": losses returned a Tensor; expected qtarget.Terms(label=..., \
residual=...) with one loss a token; wrap it
    """
    try:
        if target in _KEPT:
            return
        hashable = True
    except TypeError:
        hashable = False
    check_attributes(target)
    check_needs(target)
    # needs of another kind of training (samples, advantages) have no tokens here to be tried on
    if not any(getattr(target.needs, f.name) != f.default for f in fields(Needs) if f.name not in KNOWN_NEEDS):
        with torch.random.fork_rng(devices=[]):  # a target that draws must not move the run's seed
            for check in TRIED:
                check(target)
    if hashable:
        _KEPT.add(target)


def check_attributes(target: Target) -> None:
    """``name``, ``formula`` and ``paper`` are texts, the scope is known, flags are true or false."""
    for name in ("name", "formula", "paper"):
        value = getattr(target, name, None)
        if not isinstance(value, str) or not value.strip():
            raise broken(
                target, "attributes", f"{name} is {value!r}", "a text", f'write `{name} = "..."` into the class'
            )
    if target.scope not in get_args(Scope):
        raise broken(
            target, "attributes", f"scope is {target.scope!r}", "token, sequence or batch", "correct it in the class"
        )
    for name in FLAGS:
        if not isinstance(value := getattr(target, name), bool):
            raise broken(target, "attributes", f"{name} is {value!r}", "True or False", "correct it in the class")
    if target.scope != "token" and not hasattr(target, "label_weights"):
        step = "derive it from qtarget.LabelWeight, or give it scope token"
        raise broken(target, "attributes", f"scope is {target.scope}", "a label_weights method for that scope", step)


def check_needs(target: Target) -> None:
    """``needs`` is a ``Needs`` of statistics and of fields that a frozen model has."""
    expected = "a qtarget.Needs, such as Needs(reference=frozenset({'label_log_probs'}))"
    try:
        needs = target.needs
    except Exception as error:  # the user's own code
        raise broken(target, "needs", f"it raised {told(error, target)}", expected, "correct the property") from error
    if callable(needs):
        raise broken(target, "needs", "it is a method", expected, "write @property above it")
    if not isinstance(needs, Needs):
        raise broken(target, "needs", f"it is a {type(needs).__name__}", expected, "return one")
    for name in ("entropy", "mean_log_prob", "log_probs"):
        if not isinstance(value := getattr(needs, name), bool):
            raise broken(target, "needs", f"{name} is {value!r}", "True or False", "correct it")
    if isinstance(needs.top_k, bool) or not isinstance(needs.top_k, int) or needs.top_k < 0:
        raise broken(target, "needs", f"top_k is {needs.top_k!r}", "a number of log-probs, 0 for none", "correct it")
    for role in ("reference", "teacher"):
        value = getattr(needs, role)
        if not isinstance(value, frozenset | set):
            raise broken(
                target, "needs", f"{role} is {value!r}", f"a set of {', '.join(FROZEN)}", "write frozenset({...})"
            )
        if unknown := sorted(map(str, value - set(FROZEN))):
            raise broken(
                target,
                "needs",
                f"{role} asks for {', '.join(unknown)}",
                f"some of {', '.join(FROZEN)}",
                "ask for one of them",
            )
