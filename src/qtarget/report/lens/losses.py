"""Losses as the lens calls them: a built-in target, or any callable, behind one signature.

A callable is asked by the names of its parameters. Known names get what they say; of the others the first gets the logits
and the second the labels:

| parameter | gets |
|---|---|
| ``logits``, ``student_logits`` | live logits |
| ``outputs``, ``model_output`` | an object with ``.logits`` and ``["logits"]`` |
| ``labels``, ``label``, ``target``, ``targets`` | labels, ``-100`` where masked |
| ``teacher_logits``, ``reference_logits``, ``ref_logits``, ``base_logits`` | the synthetic frozen model's logits |
| ``num_items_in_batch``, ``num_items`` | trained tokens of the whole batch, where a probe gives them |
| ``vocab_size`` | the vocabulary's size |
"""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from qtarget.api import target_loss
from qtarget.core.errors import HyperparameterError, LossUnderLensError, UnknownTargetError
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.statistics import entropy_of
from qtarget.core.types import DATA_FIELDS, Reference, Target
from qtarget.registry import available_targets, available_trust_regions, get_target, load_outside

IGNORE = -100
COUNTED = 0.5
"""What the other rows and a cross-fit say of every token under the lens: a lens has no rows to know it from."""
PARAMETERS = {
    "logits": ("logits", "student_logits"),
    "outputs": ("outputs", "model_output"),
    "labels": ("labels", "label", "target", "targets"),
    "frozen": ("teacher_logits", "reference_logits", "ref_logits", "base_logits"),
    "num_items": ("num_items_in_batch", "num_items"),
    "vocab_size": ("vocab_size",),
}
Layout = Literal["batch", "tokens"]


class Outputs(dict):
    """Model outputs that hold logits, by attribute, by key and by place."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]

    def __getitem__(self, key: str | int) -> Tensor:
        return super().__getitem__("logits" if key == 0 else key)


@dataclass(frozen=True)
class Loss:
    """A loss behind one signature.

    Attributes:
        name: what it is called on the page.
        function: ``(logits, labels, frozen, num_items)`` to a tensor of one or more losses.
        source: where it comes from.
        target: the built-in (or ``qtarget.Target``) behind it, if it is one.
        takes: which of ``labels``, ``frozen`` and ``num_items`` it looks at.
        frozen_symbol: ``p_ref`` or ``p_T``; ``mu`` where it is the policy that sampled.
        layout: ``[batch, time, vocab]`` logits, or ``[tokens, vocab]``.
        shift: how far it moves the labels itself: 1 means that the label at t belongs to the logits at t - 1.
    """

    name: str
    function: Callable[[Tensor, Tensor, Tensor | None, int | None], Any]
    source: str
    target: Target | None = None
    takes: frozenset[str] = frozenset({"labels"})
    frozen_symbol: str = "p_T"
    layout: Layout = "batch"
    shift: int = 0

    def __call__(
        self,
        logits: Float[Tensor, "batch time vocab"],
        labels: Int[Tensor, "batch time"],
        frozen: Float[Tensor, "batch time vocab"] | None = None,
        num_items: int | None = None,
    ) -> Tensor:
        """The loss of logits and labels that are aligned; layout and shift are the loss's own affair.

        Raises:
            LossUnderLensError: it raised, or returned something else than a floating-point tensor.
        """
        logits, labels, frozen = self._shifted(logits, labels, frozen)
        if self.layout == "tokens":
            labels = labels.flatten()
            logits = logits.flatten(0, 1)
            frozen = None if frozen is None else frozen.flatten(0, 1)
        shapes = f"logits {tuple(logits.shape)} {logits.dtype}, labels {tuple(labels.shape)} {labels.dtype}"
        shapes += "" if frozen is None or "frozen" not in self.takes else f", frozen logits {tuple(frozen.shape)}"
        try:
            value = self.function(logits, labels, frozen, num_items)
        except Exception as error:
            raise LossUnderLensError(
                f"loss {self.name!r}, called with {shapes}, raised {type(error).__name__}: {error}; expected a callable of "
                "(logits, labels), [tokens, vocab] with [tokens] or [batch, time, vocab] with [batch, time]"
            ) from error
        if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            value = value[0]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise LossUnderLensError(
                f"loss {self.name!r}, called with {shapes}, returned {type(value).__name__}; expected a floating-point tensor "
                "(one number, or one a token) that depends on the logits; `.item()` and `.detach()` cut it off"
            )
        return value

    def _shifted(self, logits: Tensor, labels: Tensor, frozen: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Move the labels against the loss's own shift; the places that become free are masked."""
        if not self.shift:
            return logits, labels, frozen
        width = abs(self.shift)
        blank = labels.new_full((len(labels), width), IGNORE)
        labels = torch.cat([blank, labels] if self.shift > 0 else [labels, blank], dim=1)

        def padded(values: Tensor) -> Tensor:
            zeros = values.new_zeros(len(values), width, values.shape[-1])
            return torch.cat([values, zeros] if self.shift > 0 else [zeros, values], dim=1)

        return padded(logits), labels, None if frozen is None else padded(frozen)


def gradient(
    loss: Loss,
    logits: Float[Tensor, "batch time vocab"],
    labels: Int[Tensor, "batch time"],
    frozen: Float[Tensor, "batch time vocab"] | None = None,
    num_items: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient by the logits, in the dtype of the logits.

    Raises:
        LossUnderLensError: see ``Loss.__call__``, or the loss does not depend on the logits.
    """
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        given = None if frozen is None else frozen.clone()  # copies: the loss may write into them
        value = loss(leaf.clone(), labels.clone(), given, num_items).sum()
        if not value.requires_grad:
            raise LossUnderLensError(
                f"loss {loss.name!r} does not depend on the logits; expected a value that autograd can differentiate: "
                "no `.item()`, no `.detach()` of all of it, no `torch.no_grad()`"
            )
        try:
            (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
        except RuntimeError as error:
            raise LossUnderLensError(
                f"loss {loss.name!r} cannot be differentiated ({error}); a loss must not change its own inputs in place"
            ) from error
    return value.detach(), torch.zeros_like(leaf) if found is None else found


def load_loss(text: str) -> Loss:
    """The loss behind ``dft``, ``p_power(alpha=0.3)``, ``my_module:my_loss``, ``my_module:MyLoss(weight=2)``.

    Arguments in brackets are Python literals: hyper-parameters of a built-in, arguments of a class that is then called, or
    constants of a function. A trust region also takes ``advantage`` (default 1), that of every token. Importing a module runs
    its code.

    Raises:
        UnknownTargetError: there is no such name.
        UnknownNameError: ... or no such module or attribute.
        HyperparameterError: a built-in does not know the argument.
        LossUnderLensError: what was found is not callable, or its signature cannot be served.
    """
    name, arguments = parse_arguments(text)
    if ":" not in name or "+" in name:
        if name not in [*available_targets(), *available_trust_regions()] and "+" not in name:
            get_target(name)  # says which names are near
        if name in available_trust_regions():
            advantage = arguments.pop("advantage", 1.0)
            return region_under_lens(get_target(name, **arguments), advantage, text)
        return target_under_lens(get_target(name, **arguments), text)
    found = load_outside(name, "loss", "a built-in name (`qtarget targets`) or package.module:function")
    if inspect.isclass(found) and issubclass(found, Target):
        return target_under_lens(get_target(name, **arguments), text)
    if inspect.isclass(found):
        try:
            found = found(**arguments)
        except Exception as error:
            raise LossUnderLensError(
                f"loss {text!r}: {found.__name__} could not be made ({type(error).__name__}: {error}); give its arguments in "
                f"brackets: {name}(name=value)"
            ) from error
    elif arguments:
        found = partial(found, **arguments) if callable(found) else found
    return callable_under_lens(found, text)


def parse_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """``name(key=value, ...)`` in its two parts; values are Python literals.

    Example:
        >>> parse_arguments("p_power(alpha=0.3)")
        ('p_power', {'alpha': 0.3})
    """
    name, bracket, rest = text.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        # ``rest`` still has its closing bracket
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("not name=value")
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise UnknownTargetError(
            f"loss {text!r} cannot be read ({error}); expected name(key=value, ...) with Python literals, quoted for the shell"
        ) from error


def target_under_lens(target: Target, name: str | None = None) -> Loss:
    """A built-in target; a frozen model, where it needs one, is given by its whole distribution."""
    needs = target.needs

    def function(logits: Tensor, labels: Tensor, frozen: Tensor | None, num_items: int | None) -> Tensor:
        known = None
        if frozen is not None:
            known = Reference.from_logits(frozen, labels.masked_fill(labels == IGNORE, -1))
            counted = dict.fromkeys(DATA_FIELDS, torch.full_like(known.label_log_probs, COUNTED))  # pyright: ignore
            known = replace(known, entropy=entropy_of(known.log_probs), **counted)  # pyright: ignore
        return target_loss(
            logits,
            labels,
            target,
            reference=known if needs.reference else None,
            teacher=known if needs.teacher else None,
            num_items=num_items,
        )

    takes = {"labels", "num_items"} | ({"frozen"} if needs.reference or needs.teacher else set())
    symbol = "p_ref" if needs.reference else "p_T"
    return Loss(name or target.name, function, f"qtarget target, {target.paper}", target, frozenset(takes), symbol)


def region_under_lens(region: Target, advantage: float = 1.0, name: str | None = None) -> Loss:
    """A trust region; the synthetic frozen model is the policy that sampled, and every token has this advantage.

    Raises:
        HyperparameterError: the advantage is no finite number.
    """
    if not isinstance(advantage, int | float) or not math.isfinite(advantage):
        raise HyperparameterError(f"{region.name}: advantage={advantage!r}; expected a finite number, such as 1 or -1")

    def function(logits: Tensor, labels: Tensor, frozen: Tensor | None, num_items: int | None) -> Tensor:
        given = None if frozen is None else Reference.from_logits(frozen, labels.masked_fill(labels == IGNORE, -1))
        weights = torch.full(labels.shape, float(advantage), dtype=logits.dtype)
        return target_loss(logits, labels, region, advantages=weights, rollout=given, num_items=num_items)

    takes = frozenset({"labels", "frozen", "num_items"})
    return Loss(name or region.name, function, f"qtarget trust region, {region.paper}", region, takes, "mu")


def callable_under_lens(found: Any, name: str) -> Loss:
    """Any callable of logits and labels; its layout and shift are found by trying.

    Raises:
        LossUnderLensError: it is not callable, wants an unknown argument, or fits neither layout.
    """
    if not callable(found):
        raise LossUnderLensError(
            f"loss {name!r} is a {type(found).__name__}; expected a callable of (logits, labels), or a class of one"
        )
    roles = parameter_roles(found, name)

    def function(logits: Tensor, labels: Tensor, frozen: Tensor | None, num_items: int | None) -> Any:
        values = {
            "logits": logits,
            "outputs": Outputs(logits=logits),
            "labels": labels,
            "frozen": frozen,
            "num_items": num_items,
            "vocab_size": logits.shape[-1],
        }
        given = {p: values[role] for p, role in roles.items() if role != "num_items" or num_items is not None}
        ordered = [value for p, value in given.items() if isinstance(p, int)]
        return found(*ordered, **{p: value for p, value in given.items() if isinstance(p, str)})

    symbol = "p_T" if any(str(p).startswith("teacher") for p in roles) else "p_ref"
    takes = frozenset(roles.values()) & {"labels", "frozen", "num_items"}
    return _tried(Loss(name, function, f"{type(found).__module__}.{type(found).__name__}", None, takes, symbol))


def parameter_roles(found: Any, name: str) -> dict[str | int, str]:
    """What each parameter of a callable is given: by name, or by place (a number) where it has no name to use.

    Raises:
        LossUnderLensError: a required parameter that the lens has nothing for.
    """
    try:
        parameters = inspect.signature(found.forward if isinstance(found, torch.nn.Module) else found).parameters
    except (TypeError, ValueError):  # a built-in of C: no signature to read
        return {0: "logits", 1: "labels"}
    known = {p: role for role, names in PARAMETERS.items() for p in names}
    roles: dict[str | int, str] = {}
    pending = []
    for place, (p, parameter) in enumerate(parameters.items()):
        key = place if parameter.kind is parameter.POSITIONAL_ONLY else p
        if parameter.kind is parameter.VAR_POSITIONAL and not roles and not pending:
            return {0: "logits", 1: "labels"}
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if p in known and known[p] not in roles.values():
            roles[key] = known[p]
        elif parameter.default is parameter.empty:
            pending.append(key)
    missing = [
        r
        for r in ("logits", "labels")
        if r not in roles.values() and not (r == "logits" and "outputs" in roles.values())
    ]
    roles |= dict(zip(pending, missing))
    if len(pending) > len(missing) or not {"logits", "outputs"} & set(roles.values()):
        words = ", ".join(str(p) for p in pending[len(missing) :]) or "logits"
        raise LossUnderLensError(
            f"loss {name!r} has the signature {inspect.signature(found)}, and the lens has nothing for: {words}; expected "
            f"(logits, labels) and, by name, {', '.join(p for p in known if p not in ('label', 'targets'))}; "
            f"constants go in brackets: {name.partition('(')[0]}(name=value)"
        )
    order = list(parameters)
    return dict(sorted(roles.items(), key=lambda item: item[0] if isinstance(item[0], int) else order.index(item[0])))


BATCH, TIME, VOCAB = 2, 5, 128  # of the batch that settles layout and shift: B and T differ, so that a mix-up raises


def _tried(loss: Loss) -> Loss:
    """The loss with the layout that it accepts and the shift that it makes."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, TIME, VOCAB, generator=rng, dtype=torch.float64)
    frozen = torch.randn(BATCH, TIME, VOCAB, generator=rng, dtype=torch.float64)
    # all different, so that a label which moves shows at one place alone
    labels = torch.randperm(VOCAB, generator=rng)[: BATCH * TIME].reshape(BATCH, TIME)
    refusals = []
    for layout in ("batch", "tokens"):
        tried = replace(loss, layout=layout)
        try:
            gradient(tried, logits, labels, frozen)
        except LossUnderLensError as error:
            refusals.append(error)
            continue
        return replace(tried, shift=label_shift(tried, logits, labels, frozen))
    raise refusals[-1]


def label_shift(loss: Loss, logits: Tensor, labels: Tensor, frozen: Tensor) -> int:
    """Move one label to another token, and see at which place the gradient follows."""
    if "labels" not in loss.takes:
        return 0
    place, used = TIME // 2, set(labels.flatten().tolist())
    other = next(token for token in range(VOCAB) if token not in used)
    moved = labels.clone()
    moved[0, place] = other
    change = gradient(loss, logits, moved, frozen)[1] - gradient(loss, logits, labels, frozen)[1]
    towards = (change[0, :, int(labels[0, place])] - change[0, :, other]).abs()
    return 0 if float(towards.max()) == 0.0 else place - int(towards.argmax())
