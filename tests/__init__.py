"""Tests, in rooms as ``src/qtarget`` has them; every room runs on its own, by ``pytest`` and by ``python -m pytest``."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""Of the repository: docs, examples and scripts are tested too."""
SHARED = ROOT.parent / "shared" / "data"
"""Real data beside a checkout; tests that need it are skipped where it is absent."""
