"""Caches in the columns of other projects, both ways."""
