"""The reference cache on disk: planned, written, resumed, read, merged, verified."""
