"""The most memory that a run held: of the GPU where there is one, else of the process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak() -> None:
    """Begin to count anew."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # elsewhere the peak is the process's own, which earlier runs may have set
        CLEAR.write_text("5")  # Linux: VmHWM starts again from what is held now


def peak_bytes() -> int | None:
    """Since ``reset_peak``; None where nobody tells."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("VmHWM:")), None)
    return int(found.split()[1]) * 1024 if found else None
