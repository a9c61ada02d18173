"""Comparisons that write their numbers, their machine and their picture."""
