"""What a target promises, tried on a few made-up tokens."""
