"""docs/benchmarks.md is what its script writes from the committed results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("update_benchmarks", ROOT / "scripts" / "update_benchmarks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == script().page(), "run `python scripts/update_benchmarks.py`"
    for figure in re.findall(r"\]\((\w+\.png)\)", page):
        assert (ROOT / "docs" / figure).is_file()


def test_what_was_not_measured_is_said():
    module = script()
    assert "Not measured yet: `qtarget bench noise" in module.noise_part(None, None)
    assert "Not measured yet: `qtarget bench distill" in module.distill_part(None)
    assert "Not measured yet: `qtarget bench prior" in module.prior_part(None)
