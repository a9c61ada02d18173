"""What scoring once, serving, caching and reading cost."""
