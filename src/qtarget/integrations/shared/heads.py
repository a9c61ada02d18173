"""The language-model head as it is, not as one assumes: probe it once, then hand hidden states to the loss.

``lm_head(hidden)`` is not the logits in about every third architecture (a scale in Cohere, Granite and Falcon-H1, a
soft-cap in Gemma 2 and RecurrentGemma). The probe compares, fits, and refuses what it cannot explain.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from qtarget.core.errors import UnsupportedModelError
from qtarget.core.shapes import Tensor
from qtarget.core.types import project
from qtarget.integrations.shared.probes import probing, refuse_sight_of_later_tokens
from qtarget.integrations.shared.router import router_loss, wants_router_logits
from qtarget.loss.zero3 import gathered_while_running

SCALE_FIELDS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAP_FIELDS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
PROBE_TOKENS = 8


@dataclass(frozen=True)
class HeadSpec:
    """``logits = softcap tanh(scale (h W^T + b) / softcap)``, or without the cap where it is absent."""

    scale: float = 1.0
    softcap: float | None = None


@contextmanager
def _amplified(head: torch.nn.Module, factor: float, seen: list[Tensor]) -> Iterator[None]:
    """Multiply the head's output: a soft-cap far above the logits shows only when they are enlarged."""

    def amplify(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output.detach())
        return output * factor

    handle = head.register_forward_hook(amplify)
    try:
        yield
    finally:
        handle.remove()


def _snap(value: float, candidates: list[float]) -> float:
    """The config's own number where it agrees within 1 %: the fit is only as exact as the model's dtype."""
    return next((c for c in candidates if c and abs(value - c) <= 0.01 * abs(c)), value)


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    found = [getattr(config, name, None) for name in names]
    return [float(v) for v in found if isinstance(v, int | float) and v]


def refuse_encoder_decoder(model: Any) -> None:
    """Raises: UnsupportedModelError: the model reads its input with an encoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder: its decoder sees the whole input, and labels are not its input "
            "shifted by one; expected a decoder-only model such as Llama or Qwen (class ...ForCausalLM)"
        )


def probe_head(model: PreTrainedModel) -> HeadSpec:
    """Find scale and soft-cap by running a few tokens through the model with its head's output enlarged.

    Raises:
        UnsupportedModelError: an encoder-decoder or a bidirectional model, no output embedding, a backbone that does not
            end at the head's input, or logits that neither a scale nor a tanh soft-cap explains.
    """
    refuse_encoder_decoder(model)
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output embeddings; expected a causal language model"
        )
    with probing(model), gathered_while_running(model, head):
        refuse_sight_of_later_tokens(model, lambda inputs: backbone_states(model, inputs))
        return _probe(model, head)


def backbone_states(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
    """Hidden states ``[batch, time, width]`` that the head reads.

    Raises:
        UnsupportedModelError: the backbone returns none.
    """
    states = getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    if states is None:
        raise UnsupportedModelError(
            f"{type(model).__name__}.base_model returns no last_hidden_state, so the loss cannot start from hidden states; "
            "use TRL's SFTTrainer with qtarget.target_loss on full logits"
        )
    return states


def _probe(model: PreTrainedModel, head: Any) -> HeadSpec:
    config = model.config.get_text_config()
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % head.weight.shape[0]
    # so small that a soft-cap is linear and the scale alone shows
    raw, small = _run(model, head, ids, 1e-4)
    hidden = backbone_states(model, {"input_ids": ids})
    exact = head.weight.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    # half precision rounds hidden states and logits on the way
    tolerance = 1e-3 if exact else 3e-2
    if not _close(project(hidden[0], head.weight, getattr(head, "bias", None))[None], raw, tolerance):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its head is not a plain linear layer on base_model(...).last_hidden_state, so the loss "
            "cannot start from hidden states; use TRL's SFTTrainer with qtarget.target_loss on full logits"
        )
    # Granite divides by its field where others multiply
    scales = [1.0, *_numbers(config, SCALE_FIELDS), *(1 / v for v in _numbers(config, SCALE_FIELDS))]
    scale = _snap(float((raw * small).sum() / (raw * raw).sum()) / 1e-4, scales)
    return HeadSpec(scale, _probe_softcap(model, head, ids, raw, scale, tolerance))


def _probe_softcap(
    model: PreTrainedModel, head: Any, ids: Tensor, raw: Tensor, scale: float, tolerance: float
) -> float | None:
    # far beyond every cap in use (30 in Gemma 2), so that tanh is flat and its height is the cap
    reach = 1e4 / float((scale * raw).abs().max())
    _, large = _run(model, head, ids, reach)
    if _close(large, scale * reach * raw, tolerance):
        return None
    softcap = _snap(float(large.abs().max()), _numbers(model.config.get_text_config(), SOFTCAP_FIELDS))
    # where tanh is neither linear nor flat: another function of the same height would show
    middle = 2 * softcap / float((scale * raw).abs().max())
    _, capped = _run(model, head, ids, middle)
    if not _close(capped, softcap * torch.tanh(scale * middle * raw / softcap), tolerance):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its logits are neither scale x head(h) nor a tanh soft-cap of it, so the loss cannot "
            "rebuild them; use TRL's SFTTrainer with qtarget.target_loss on full logits"
        )
    return softcap


def _run(model: PreTrainedModel, head: Any, ids: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The head's raw output and the model's logits with that output multiplied by ``factor``, in float32."""
    seen: list[Tensor] = []
    with _amplified(head, factor, seen):
        logits = model(input_ids=ids, use_cache=False).logits
    return seen[-1].float(), logits.float()


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Relative error within the tolerance; NaN is never close."""
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30)) <= tolerance


@contextmanager
def _in_place_of_forward(module: torch.nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let ``module(x)`` run its hooks around ``function`` instead of around its forward."""
    # accelerate's hooks put a forward on the module itself, which must come back
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


LossOfHidden = Callable[[Tensor, Tensor, Tensor | None, HeadSpec], Any]
"""Called inside the model's forward with hidden states ``[batch, time, width]``, head weight, bias and spec."""


@dataclass(frozen=True)
class Forwards:
    """The forwards that a model has besides the loss; bound methods, which a deep copy binds to the copy.

    Attributes:
        plain: gives logits.
        fused: TRL's, with its fused head, where TRL has added one.
    """

    plain: Callable[..., Any]
    fused: Callable[..., Any] | None = None


# the loss counts tokens and works chunk by chunk, each of which would end a compiled graph: one end instead, after the backbone
@torch.compiler.disable
def _loss_in_head(head: Any, hidden: Tensor, target_loss: LossOfHidden, spec: HeadSpec) -> Any:
    def loss_of(hidden: Tensor) -> Any:
        bias = getattr(head, "bias", None)
        return target_loss(hidden.to(head.weight.device), head.weight, bias, spec)

    with _in_place_of_forward(head, loss_of):
        return head(hidden)


def add_target_head(model: PreTrainedModel, spec: HeadSpec) -> None:
    """Let ``model(..., target_loss=f)`` return ``f(hidden, weight, bias, spec)`` instead of logits.

    The loss takes the place of the head's own forward, inside its hooks: there FSDP2 and DeepSpeed ZeRO-3 have gathered
    the weights, in the dtype they compute in, and wait for the weights' gradient. Added again, it takes its own place.
    The function that it leaves knows the model by ``self`` alone, so that a deep copy computes with its own weights.

    A mixture of experts whose configuration asks for router logits gets ``aux_loss``, unweighted, in what is returned.
    """

    def forward(self: Any, *args: Any, target_loss: LossOfHidden | None = None, **kwargs: Any) -> Any:
        if target_loss is None:
            forwards: Forwards = self._target_forwards
            if forwards.fused is not None and kwargs.get("fused_lm_head"):
                return forwards.fused(*args, **kwargs)
            return forwards.plain(*args, **kwargs)
        kwargs["use_cache"] = False
        routed = wants_router_logits(self)
        if routed:
            kwargs["output_router_logits"] = True
        backbone = self.base_model(*args, **kwargs)
        found: Any = _loss_in_head(self.get_output_embeddings(), backbone.last_hidden_state, target_loss, spec)  # pyright: ignore[reportCallIssue]
        if routed and isinstance(found, ModelOutput):  # a probe returns hidden states
            found["aux_loss"] = router_loss(self, backbone, kwargs.get("attention_mask"))
        return found

    model._target_forwards = _forwards(model)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    # `generate` looks for the keys that a model knows in the signature of its class
    wrapped: Any = functools.wraps(type(model).forward)(forward)
    wrapped._is_target_forward = True
    model.forward = types.MethodType(wrapped, model)


def _forwards(model: PreTrainedModel) -> Forwards:
    """What is under the forwards that TRL, accelerate and earlier trainers have put on a model.

    TRL 1.16's fused head and accelerate 1.15's mixed precision close over the forward of the very model that they were
    added to; trainers add theirs again.
    """
    plain, fused = model.forward, None
    while True:
        function = getattr(plain, "__func__", None)
        if getattr(function, "_is_target_forward", False):
            known: Forwards = model._target_forwards  # pyright: ignore[reportAssignmentType]
            return Forwards(known.plain, fused or known.fused)
        prepared = model.__dict__.get("_original_forward")
        if function is not None and "fused_lm_head" in inspect.signature(function, follow_wrapped=False).parameters:
            fused = fused or plain
            plain = inspect.getclosurevars(function).nonlocals["original_forward"]
        elif prepared is not None and _wraps(function, prepared.__func__):
            plain = model.__dict__.pop("_original_forward")
            model.__dict__.pop("_is_accelerate_prepared", None)  # or the next accelerator would not autocast again
        else:
            return Forwards(plain, fused)


def _wraps(outer: Any, inner: Any) -> bool:
    while outer is not None and outer is not inner:
        outer = getattr(outer, "__wrapped__", None)
    return outer is inner
