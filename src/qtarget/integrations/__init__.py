"""One file for each outside trainer: the only place where it is imported."""
