"""The process that the supervisor starts: load the model, fork the stages, run mosec.

``python -m qtarget.serving.pipeline FOLDER --port N ...``: the folder holds ``settings.json``, ``secret`` and the
heartbeats; all other arguments are mosec's own, which it reads from ``sys.argv``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from qtarget.core.errors import QTargetError
from qtarget.serving.cell import wrapper
from qtarget.serving.settings import IDENTITY, ServeSettings
from qtarget.storage.files import write_json

if TYPE_CHECKING:
    from qtarget.serving.model import Loaded

SETTINGS = "settings.json"
SECRET = "secret"
FAILURE = "failure"
"""File with what is wrong with the model, for a start that ends by it."""


def die_with_parent() -> None:
    """Kill the whole process group when standard input ends: its other end is the supervisor's, however that died."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def watch_parent() -> None:
    """``die_with_parent`` beside whatever this process does."""
    threading.Thread(target=die_with_parent, daemon=True).start()


def load(settings: ServeSettings, folder: Path) -> Loaded:
    """What the settings' loader makes of them; what it says against the model is left for the supervisor."""
    module, name = settings.loader.split(":")
    loader = getattr(import_module(module), name)
    try:
        return loader(settings)
    except (QTargetError, OSError, ValueError) as error:
        step = (
            "" if isinstance(error, QTargetError) else "; expected a folder that transformers can load, or a hub name"
        )
        text = f"model {settings.model!r} cannot be served: {error}{step}"
        (folder / FAILURE).write_text(text, encoding="utf-8")
        sys.exit(1)


def main(folder: Path) -> None:
    """Serve until a signal; mosec returns from every failure without an error, so the caller counts each return as one."""
    watch_parent()
    import torch

    torch.set_num_threads(1)  # before the first operation: OpenMP's threads would not survive the fork
    settings = ServeSettings.read(folder / SETTINGS)
    loaded = load(settings, folder)

    from mosec import Server, runtime  # pyright: ignore[reportMissingImports]

    from qtarget.serving.stages import Context, Egress, Ingest, Score, Stage

    Stage.context = Context(loaded, folder, (folder / SECRET).read_bytes())
    write_json(folder / IDENTITY, asdict(loaded.identity))
    warnings.filterwarnings("ignore", message="IPC data")  # answers with top-k are megabytes; the limits bound them
    # forked, not spawned: one import and one copy of the weights for all workers, and a dead one is back in milliseconds
    shared = {"start_method": "fork", "timeout": settings.timeout, "route": "/score"}
    program = runtime.get_mosec_path()  # pyright: ignore[reportPrivateImportUsage]
    if program is not None:  # mosec 0.9 has no option for the program that it starts
        runtime.get_mosec_path = partial(wrapper, folder, program)  # pyright: ignore[reportPrivateImportUsage]
    server = Server()
    server.append_worker(Ingest, **shared)
    server.append_worker(
        Score, num=settings.workers, max_batch_size=settings.max_batch, max_wait_time=settings.wait_ms, **shared
    )
    server.append_worker(Egress, **shared)
    server.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
