"""``qtarget lens``: what any loss teaches, its faults, as JSON and as a page."""
