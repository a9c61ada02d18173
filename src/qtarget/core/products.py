"""Products of weights and log-probs, where 0 times minus infinity is 0."""

from __future__ import annotations

from qtarget.core.shapes import Float, Tensor


def weighted(weight: Tensor | float, values: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """``weight values``, 0 in value and gradient where the weight is 0 and the value infinite.

    A token whose logit is minus infinity has the log-prob minus infinity, and a weight that its probability carries is 0
    there: the limit of ``p log p``, not NaN. A NaN stays one.

    Args:
        weight: ``[tokens]``, detached, or one number.
        values: ``[tokens]`` log-probs or losses, nats.

    Example:
        >>> import torch
        >>> weighted(torch.tensor([0.0, 0.5]), torch.tensor([-torch.inf, -2.0]))
        tensor([ 0., -1.])
    """
    if isinstance(weight, Tensor):
        return weight * values.masked_fill((weight == 0) & values.isinf(), 0.0)
    return weight * (values if weight else values.masked_fill(values.isinf(), 0.0))
