"""Training runs in processes of one thread each; every result is saved as it comes, so that a stopped benchmark goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from qtarget.benchmarks.demo_runs import quiet_libraries
from qtarget.errors import ConfigError


class KeyedJob(Protocol):
    """A run with a name that is its own."""

    @property
    def key(self) -> str: ...


class RunLog:
    """Finished runs, one JSON object a line: ``{"key": ..., ...}``. A line that was cut off by a kill is dropped.

    Args:
        path: of the file.
        resume: keep the runs that it holds; else it must be absent.

    Raises:
        ConfigError: the file is there and ``resume`` is false, or a line is no run.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        if path.exists() and not resume:
            raise ConfigError(f"{path} holds the runs of an earlier benchmark; go on with --resume, or delete it")
        self.path, self.runs = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                run = json.loads(line)
                self.runs[run.pop("key")] = run
            except (ValueError, KeyError, AttributeError) as error:
                raise ConfigError(
                    f"{path}:{number} is no finished run ({error}); delete the line or the file"
                ) from error
        path.write_text(whole, encoding="utf-8")

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.runs[key] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **result}) + "\n")


class Workers:
    """``count`` processes that each hold one worker, built by ``build(*arguments)``; a context manager.

    The numbers do not depend on how many there are: each has one thread.
    """

    def __init__(self, count: int, build: Callable[..., Any], *arguments: Any) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and locks
        self.pool = ProcessPoolExecutor(count, spawn, _start, (build, arguments))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[KeyedJob], log: RunLog, on_done: Callable[[KeyedJob], None]) -> list[dict[str, Any]]:
        """The results of all jobs, in their order; those in the log are not run again."""
        futures = {self.pool.submit(_work, job): job for job in jobs if job.key not in log.runs}
        for future in as_completed(futures):
            log.add(futures[future].key, future.result())
            on_done(futures[future])
        return [log.runs[job.key] for job in jobs]


_worker: Any = None
_silence = ExitStack()  # held for the life of a worker: a forgotten context manager is closed when it is collected


def _start(build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _worker
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a pool's worker"
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _silence.enter_context(quiet_libraries())
    _worker = build(*arguments)


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)  # a killed parent would leave its workers waiting for ever


def _work(job: Any) -> dict[str, Any]:
    return _worker(job)
