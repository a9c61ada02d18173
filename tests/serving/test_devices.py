"""A GPU that is not there is named before a model is loaded for it."""

from __future__ import annotations

import pytest

from qtarget.core.errors import ConfigError
from qtarget.serving.model import check_device, load
from qtarget.serving.settings import ServeSettings


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there(device, count, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"device {device}: this machine has {count} CUDA devices"):
        load(ServeSettings(model="never looked for", device=device))


def test_devices_that_are_there(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        check_device(device)
