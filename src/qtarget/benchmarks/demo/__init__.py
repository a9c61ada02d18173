"""``qtarget demo``: several targets on the same noisy rows."""
