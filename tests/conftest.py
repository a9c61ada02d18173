"""Shared by all tests: no network, one thread, and the core's shape annotations checked at run time."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if importlib.util.find_spec("torch") and not os.path.exists("/dev/nvidiactl"):
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import: its kernels then run on a CPU

CHECKED = (
    *(f"core.{m}" for m in ("statistics", "outcomes", "coefficients", "types", "residuals", "reductions", "induced")),
    *(
        f"loss.{m}"
        for m in (
            "backends",
            "chunked",
            "columns",
            "dense",
            "dispatch",
            "head",
            "result",
            "whole_rows",
            "kernels.pytorch",
        )
    ),
    "api",
    "targets",
    "divergences",
    "composed",
)
"""Core modules (with what lies below them) whose every call is checked against its jaxtyping annotations."""

if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    import tests.core_typechecker  # noqa: F401 - the hook looks the checker up by name, and does not import it

    install_import_hook([f"qtarget.{name}" for name in CHECKED], "tests.core_typechecker.checked")

import pytest  # noqa: E402 - after the hook
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples on every run: a red suite is never a matter of luck. To explore: `--hypothesis-profile=default`.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_command_line():
    """What one test's command line was is nothing to the messages of the next."""
    yield
    from qtarget.command import forget

    forget()
