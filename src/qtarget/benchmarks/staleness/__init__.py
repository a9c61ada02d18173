"""``qtarget bench staleness``: which trust region stands how old, how often used, and how wrongly sampled data."""
