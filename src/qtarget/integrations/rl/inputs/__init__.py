"""What a run on samples reads: prompts and their rows, and the functions that reward answers."""
