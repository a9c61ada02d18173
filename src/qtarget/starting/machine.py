"""What this machine computes with, and how much of it is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """A device.

    Attributes:
        name: as people call it.
        kind: ``cuda``, ``mps``, ``cpu``, ...
        free: bytes that are free.
        bf16: whether it multiplies in bfloat16 by itself.
    """

    name: str
    kind: str
    free: int
    bf16: bool


def this_machine(*, cpu: bool = False) -> Machine:
    """The device that training will take: an accelerator where there is one, else the processor.

    Args:
        cpu: take the processor all the same (``use_cpu``).
    """
    import torch

    if torch.cuda.is_available() and not cpu:
        free, _ = torch.cuda.mem_get_info()
        # a card without such units computes it all the same, slower than float32
        return Machine(torch.cuda.get_device_name(), "cuda", free, torch.cuda.is_bf16_supported(False))
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() and not cpu else None
    kind = "cpu" if found is None else found.type
    return Machine(f"this machine's {'processor' if kind == 'cpu' else kind}", kind, free_memory(), False)


def free_memory(group: Path = CONTROL_GROUP) -> int:
    """Bytes of main memory that are free here, by the machine and by the container's own limit."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group, or "max"
        return free
    return max(0, min(free, limit))
