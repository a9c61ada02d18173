"""What the numbers are from: every result file says its machine and its versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qtarget.loss.head import multiplies_bfloat16


def machine(device: str) -> dict[str, Any]:
    """What a measured speed depends on."""
    facts: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": multiplies_bfloat16("cpu"),
    }
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        facts["processor"] = next((v.strip() for k, _, v in lines if k.strip() == "model name"), facts["processor"])
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def machine_facts() -> dict[str, Any]:
    """What a run of many worker processes depends on."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads_per_worker": 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    packages = ("qtarget", "torch", "transformers", "trl", "datasets", "accelerate")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
