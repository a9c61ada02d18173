"""How fast and how small: the loss, and a whole step of training."""
