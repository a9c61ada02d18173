"""`bench rl`: its machinery on the embedded base, which needs no package and takes seconds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qtarget.benchmarks.real import rl
from qtarget.core.errors import ConfigError
from qtarget.data.embedded import base_model_path


class Stopped(Exception):
    """As a kill would."""


def stop(*_):
    raise Stopped


def test_a_model_of_a_stopped_run_is_taken_again_with_its_log_and_never_at_other_settings(tmp_path, monkeypatch):
    """Stopped after the first folder and before the first result: nothing but the folder tells how it was made."""
    config, output, base = replace(rl.QUICK, start_steps=2), tmp_path / "rl.json", base_model_path()
    with monkeypatch.context() as patched:
        patched.setattr(rl, "asked", stop)
        with pytest.raises(Stopped):
            rl.run_real_rl(config, base, output, resume=False, progress=print)
    weights = tmp_path / "rl.models/start/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"rl\.models was made with another start_steps; delete it"):
        rl.run_real_rl(replace(config, start_steps=3), base, output, resume=True, progress=print)
    with pytest.raises(Stopped):
        rl.run_real_rl(config, base, output, resume=True, progress=stop)
    assert weights.stat().st_mtime_ns == before
    found = json.loads(output.read_text())["models"]["start"]
    assert len(found["log"]) == 2
    assert found["train_cpu_seconds"] > 0
    assert len(found["greedy"]) == config.test_rows
    (tmp_path / "rl.models/settings.json").unlink()
    with pytest.raises(ConfigError, match="nobody knows what it was made with"):
        rl.run_real_rl(config, base, output, resume=True, progress=stop)
