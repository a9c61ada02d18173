"""``qtarget bench noise``: which targets survive noise."""
