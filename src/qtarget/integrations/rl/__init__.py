"""Samples of the model's own: reinforcement learning and on-policy distillation on TRL's ``GRPOTrainer``."""
