"""A GPU that is not there is named before a model is loaded for it."""

from __future__ import annotations

import asyncio

import pytest

from qtarget.core.errors import ConfigError
from qtarget.data.embedded import base_model_path
from qtarget.scoring.sources.identity import Limits
from qtarget.serving import server
from qtarget.serving.model import load
from qtarget.serving.settings import ServeSettings, check_device


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there(device, count, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(ConfigError, match=f"device {device}: this machine has {count} CUDA devices"):
        load(ServeSettings(model="never looked for", device=device))


def test_devices_that_are_there(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:1", "mps"):
        check_device(device)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cuda:77"}, "this machine has 0 CUDA devices"),
        ({"limits": Limits(row_tokens=9999)}, "--max-row-tokens 9999 exceeds the model's 256 positions"),
    ],
)
def test_options_are_checked_before_anything_is_started(options, words, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(server, "Supervisor", None)  # which starts the pipeline
    settings = ServeSettings(model=str(base_model_path()), **options)
    with pytest.raises(ConfigError, match=words):
        asyncio.run(server.serve(settings, host="127.0.0.1", port=0, token=None, on_ready=print))
