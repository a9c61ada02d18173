"""The example of docs/inspect.md on real marked rows. Needs the data folder beside the checkout; skipped without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT, SHARED

DATA = Path(os.environ.get("QTARGET_REAL_DATA", SHARED))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "models").is_dir(), reason=f"real data not found at {DATA}; set QTARGET_REAL_DATA")
def test_example_on_marked_rows_end_to_end(tmp_path):
    """A few rows of each: pages, JSON and areas are there, with the marks of the data."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "scripts/measure_marked_rows.py", "--data", str(DATA), "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "--limit", "40", "--steps", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "auc.json").read_text())["data"]
    assert set(results) == {"gsm8k_model_solutions", "halueval_general"}
    for name, found in results.items():
        rows = [json.loads(line) for line in (tmp_path / name / f"{name}.jsonl").read_text().splitlines()]
        assert (tmp_path / f"{name}.html").stat().st_size < 2e6
        assert [view["model"] for view in found["views"]] == ["tinystories-656k", "after-clean-rows"]
        for view in found["views"]:
            assert view["marked_rows"] == sum(row["is_noise"] for row in rows)
        document = json.loads((tmp_path / name / "page.json").read_text())
        for view, described in zip(found["views"], document["views"], strict=True):
            pairs = list(zip(described["row_nll"], document["row_marked"], strict=True))
            wins = [(a > b) + (a == b) / 2 for a, bad in pairs if bad for b, other in pairs if not other]
            assert view["by_row"]["mean surprise, -log p"][0] == pytest.approx(sum(wins) / len(wins))
