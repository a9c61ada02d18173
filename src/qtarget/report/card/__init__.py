"""A model card of a run: what was trained how, on what, and how well it did."""
