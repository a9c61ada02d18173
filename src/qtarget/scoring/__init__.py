"""The reference cache: the frozen model is run once over the training rows; training looks its numbers up."""
