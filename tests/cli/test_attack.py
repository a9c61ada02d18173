"""The attack on the command line, in its quick form: bad inputs, a kill of each verb, disks that refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
def test_the_command_line_holds(tmp_path):
    found = tmp_path / "attack.json"
    command = [sys.executable, str(ROOT / "scripts/attack.py"), "--quick", "--output", str(found)]
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert found.exists(), done.stderr
    parts = json.loads(found.read_text())["parts"]
    assert set(parts) == {"inputs", "kills", "disks"}
    assert done.returncode == 0, (parts["inputs"]["found"], parts["kills"], parts["disks"]["found"])
    assert parts["inputs"]["cases"] > 12 and not parts["inputs"]["inputs_changed"]
    assert all(parts["kills"][verb]["same_bytes"] == 1 for verb in ("train", "score"))
    assert parts["disks"]["tries"] > 3
