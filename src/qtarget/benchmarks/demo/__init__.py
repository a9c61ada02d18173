"""``qtarget demo``: one decision, where the base knows the task and where it does not."""
