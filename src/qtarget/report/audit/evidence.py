"""What the benchmarks of this repository measured, in the form that advice reads."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def evidence() -> dict[str, Any]:
    """``evidence.json``, which ``scripts/update_evidence.py`` collects from ``benchmarks/results``."""
    return json.loads(files("qtarget.report.audit").joinpath("evidence.json").read_text(encoding="utf-8"))
