"""Checkpoints that were saved to the end, told from those that a kill cut off."""

from __future__ import annotations

from pathlib import Path

COMPLETE_MARK = "qtarget_complete"
"""Written last into a checkpoint folder: without it the checkpoint was cut off while being saved."""


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint that was saved to the end; one cut off by a kill is passed over."""
    found = [p.parent for p in Path(output_dir).glob(f"checkpoint-*/{COMPLETE_MARK}")]
    steps = [(int(p.name.rsplit("-", 1)[1]), p) for p in found if p.name.rsplit("-", 1)[1].isdigit()]
    return str(max(steps)[1]) if steps else None
