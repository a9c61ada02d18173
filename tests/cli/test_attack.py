"""The attack on the command line, in its quick form: bad inputs, a kill of each verb, disks that refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT


def attacked(tmp_path, *parts: str) -> dict:
    found = tmp_path / "attack.json"
    command = [sys.executable, str(ROOT / "scripts/attack.py"), "--quick", "--output", str(found)]
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(
        [*command, "--parts", ",".join(parts)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert found.exists(), done.stderr
    said = json.loads(found.read_text())["parts"]
    assert set(said) == set(parts)
    assert done.returncode == 0, said
    return said


@pytest.mark.nightly
def test_bad_inputs_and_disks_that_refuse(tmp_path):
    parts = attacked(tmp_path, "inputs", "disks")
    assert parts["inputs"]["cases"] > 12 and not parts["inputs"]["inputs_changed"]
    assert parts["disks"]["tries"] > 3


@pytest.mark.nightly
def test_a_kill_of_each_verb(tmp_path):
    """Of training and scoring alone: `test_hold`, in `make test`."""
    kills = attacked(tmp_path, "kills")["kills"]
    assert all(kills[verb]["same_bytes"] == 1 for verb in ("train", "score"))
