"""``qtarget bench``: a file for each kind of measurement."""
