"""What libraries warn of in everybody's runs and no user can change, settled for all trainers."""

from __future__ import annotations

import warnings
from typing import Any

import torch


def use_new_names(args: Any) -> None:
    """Set ``activation_checkpointing`` where TRL 1.16 sets the name that transformers 5 warns of; before its checks."""
    if args.activation_checkpointing is None:
        args.activation_checkpointing = args.gradient_checkpointing
        args.activation_checkpointing_kwargs = (
            args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs
        )


def pin_where_there_is_need(args: Any) -> None:
    """No pinned memory without an accelerator: torch warns of it where there is nothing to pin for."""
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False


def hush_old_names() -> None:
    """Nothing of the old names of checkpointing that TRL 1.16 calls at every sampling."""
    warnings.filterwarnings("ignore", message="`gradient_checkpointing_(en|dis)able`", category=FutureWarning)
