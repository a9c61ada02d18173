"""``qtarget bench distill``: how much data does a distribution save."""
