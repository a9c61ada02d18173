"""Where the rest of the mass goes: uniform, the reference, a teacher, or a mixture of self and teacher.

All functions take log-probabilities on shared outcomes (``Outcomes``: the whole vocabulary, or top-k and a tail), so a
formula is written once for full and for sparse distributions. Units are nats.
"""

from __future__ import annotations

import torch

from qtarget.core.errors import IncompatibleError
from qtarget.core.shapes import Float, Tensor
from qtarget.core.types import Outcomes, Reference


def expectation(log_probs: Tensor, values: Tensor) -> Float[Tensor, " tokens"]:
    """``sum exp(log_probs) values`` where an outcome of probability zero counts zero, whatever its value.

    The values are masked before the product, so that such an outcome's gradient is zero too and not ``0 x inf``.
    """
    probs = log_probs.exp()
    if probs.device.type == "cpu" and not torch.compiler.is_compiling():  # the mask costs more than all else there
        total = (probs * values).sum(-1)
        if bool(total.isfinite().all()):  # then no value was infinite
            return total
    return (probs * values.masked_fill(probs == 0, 0.0)).sum(-1)


def cross_entropy(
    target_log_probs: Float[Tensor, "tokens outcomes"], model_log_probs: Float[Tensor, "tokens outcomes"]
) -> Float[Tensor, " tokens"]:
    """``-sum q log p``; its gradient is a pull of weight one towards ``q``."""
    return -expectation(target_log_probs, model_log_probs)


def forward_kl(pair: Outcomes) -> Float[Tensor, " tokens"]:
    """``KL(frozen || model)``: the cross entropy minus the frozen model's entropy, so it is 0 at agreement."""
    return cross_entropy(pair.frozen, pair.model) - cross_entropy(pair.frozen, pair.frozen)


def geometric_mixture(pair: Outcomes, teacher_weight: float) -> Float[Tensor, "tokens outcomes"]:
    """``log softmax((1 - w) sg z + w z_frozen)``, detached: the normalised geometric mean of self and frozen model.

    Log-probs stand in for logits: the softmax removes the two normalisers. An outcome that the frozen model excludes
    (minus infinity) stays excluded for every ``w > 0``; at ``w = 0`` the mixture is the model itself.
    """
    model = pair.model.detach()
    if teacher_weight == 0:
        return model - model.logsumexp(-1, keepdim=True)
    if teacher_weight == 1:  # 0 x minus infinity: a token that the live model bans
        return pair.frozen.log_softmax(-1)
    return ((1 - teacher_weight) * model + teacher_weight * pair.frozen).log_softmax(-1)


def uniform_cross_entropy(mean_log_prob: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Cross entropy towards the uniform distribution: minus the mean log-prob of the vocabulary."""
    return -mean_log_prob


def reverse_kl(pair: Outcomes) -> Float[Tensor, " tokens"]:
    """``KL(model || frozen)``; infinite where the model keeps mass on an outcome that the frozen model excludes."""
    return expectation(pair.model, pair.model - pair.frozen)


def log_mixture(pair: Outcomes, frozen_weight: float) -> Float[Tensor, "tokens outcomes"]:
    """``log((1 - w) p + w p_frozen)``, in float32 never below log 1e-38; exact at ``w = 0`` and ``w = 1``."""
    if frozen_weight in (0, 1):
        return pair.frozen if frozen_weight else pair.model
    mixture = (1 - frozen_weight) * pair.model.exp() + frozen_weight * pair.frozen.exp()
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()  # at 0 its gradient would be 0 / 0


def refuse_renormalize(frozen: Reference | None, name: str) -> None:
    """Raise where a divergence would be infinite at every token.

    Raises:
        IncompatibleError: the frozen distribution was cut to its top k and scaled up.
    """
    if frozen is not None and frozen.log_probs is None and frozen.tail_policy == "renormalize":
        raise IncompatibleError(
            f"{name!r} is infinite for a teacher whose tail was dropped (tail_policy 'renormalize'); "
            "use tail_policy 'bucket' or 'spread', or a forward divergence"
        )
