"""The reference cache: the frozen model is run once over the training rows; training looks its numbers up."""

from qtarget.scoring.rows import IntArray, ScoredRow, Source

__all__ = ["IntArray", "ScoredRow", "Source"]
