"""``qtarget inspect``: rows, tokens and what each target does at them, as JSON and as a page."""
