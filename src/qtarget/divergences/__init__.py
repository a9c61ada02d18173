"""One divergence per file, for targets whose pull is not linear in the frozen distribution."""
