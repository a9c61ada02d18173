"""What the verbs share: settings, configs, rows, models, and where results go."""
