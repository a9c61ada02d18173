"""Targets made of targets."""
