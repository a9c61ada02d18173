"""Two kinds of rows by one number each: a mixture of two normal distributions, fitted without labels."""

from __future__ import annotations

import numpy as np

ROUNDS = 200


def likelier_part(surprise: np.ndarray) -> np.ndarray:
    """``[rows]`` which rows are of the part with the lower mean, by a posterior of a half or more.

    The parts start at the lower and the upper quarter. A row below the mean of the lower part is always of it: the wider
    normal distribution has the heavier tail on both sides.

    Args:
        surprise: ``[rows]`` such as mean NLL, nats.

    Example:
        >>> likelier_part(np.array([0.1, 0.2, 0.15, 3.0, 3.2])).tolist()
        [True, True, True, False, False]
    """
    if np.ptp(surprise) == 0:  # one kind of rows, and no second part to leave out
        return np.ones(len(surprise), dtype=bool)
    means, share = np.quantile(surprise, [0.25, 0.75]), np.array([0.5, 0.5])
    spread = np.full(2, surprise.std())
    tiny = 1e-3 * spread[0]
    for _ in range(ROUNDS):
        logs = np.log(share) - np.log(spread) - 0.5 * ((surprise[:, None] - means) / spread) ** 2
        posterior = np.exp(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
        weight = posterior.sum(0) + 1e-12
        share = weight / weight.sum()
        means = (posterior * surprise[:, None]).sum(0) / weight
        spread = np.sqrt((posterior * (surprise[:, None] - means) ** 2).sum(0) / weight) + tiny
    lower = int(means.argmin())
    return (posterior[:, lower] >= 0.5) | (surprise <= means[lower])
