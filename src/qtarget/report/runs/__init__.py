"""``qtarget report``: runs side by side, as JSON and as pictures."""
