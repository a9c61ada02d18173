"""What trained models do with rows they never saw: likelihood, completed tasks, and what they forgot."""
