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
from importlib import import_module
from pathlib import Path

from qtarget.serving.settings import IDENTITY, ServeSettings
from qtarget.storage.files import write_json

SETTINGS = "settings.json"
SECRET = "secret"


def die_with_parent() -> None:
    """Kill the whole process group when standard input ends: its other end is the supervisor's, however that died."""
    while os.read(0, 1):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


def watch_parent() -> None:
    """``die_with_parent`` beside whatever this process does."""
    threading.Thread(target=die_with_parent, daemon=True).start()


def main(folder: Path) -> None:
    """Serve until a signal; mosec returns from every failure without an error, so the caller counts each return as one."""
    watch_parent()
    import torch

    torch.set_num_threads(1)  # before the first operation: OpenMP's threads would not survive the fork
    settings = ServeSettings.read(folder / SETTINGS)
    module, name = settings.loader.split(":")
    loaded = getattr(import_module(module), name)(settings)

    from mosec import Server  # pyright: ignore[reportMissingImports]

    from qtarget.serving.stages import Context, Egress, Ingest, Score, Stage

    Stage.context = Context(loaded, folder, (folder / SECRET).read_bytes())
    write_json(folder / IDENTITY, asdict(loaded.identity))
    warnings.filterwarnings("ignore", message="IPC data")  # answers with top-k are megabytes; the limits bound them
    # forked, not spawned: one import and one copy of the weights for all workers, and a dead one is back in milliseconds
    shared = {"start_method": "fork", "timeout": settings.timeout, "route": "/score"}
    server = Server()
    server.append_worker(Ingest, **shared)
    server.append_worker(
        Score, num=settings.workers, max_batch_size=settings.max_batch, max_wait_time=settings.wait_ms, **shared
    )
    server.append_worker(Egress, **shared)
    server.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
