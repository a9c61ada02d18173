"""Training runs in processes of one thread each; every result is saved as it comes, so that a stopped benchmark goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from qtarget.benchmarks.start import Start
from qtarget.core.errors import ConfigError
from qtarget.storage.files import append_text, write_atomic

WORKERS = 2
"""Processes, unless somebody says otherwise."""
Progress = Callable[[int, int, str], None]
"""Told steps or runs done, how many there are in all, and what was done last."""


class KeyedJob(Protocol):
    """A run with a name that is its own."""

    @property
    def key(self) -> str: ...


def refuse_earlier(path: Path, resume: bool) -> None:
    """Raise if runs are there that nobody asked to go on with.

    Raises:
        ConfigError: see above.
    """
    if path.exists() and not resume:
        raise ConfigError(f"{path} holds the runs of an earlier benchmark; go on with --resume, or delete it")


class RunLog:
    """Finished runs, one JSON object a line: ``{"key": ..., ...}``. A line that was cut off by a kill is dropped.

    Args:
        path: of the file.
        resume: keep the runs that it holds; else it must be absent.

    Raises:
        ConfigError: the file is there and ``resume`` is false, or a line is no run.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        refuse_earlier(path, resume)
        self.path, self.runs = path, {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                run = json.loads(line)
                self.runs[run.pop("key")] = run
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number} is no finished run ({error}); delete the line or the file"
                ) from error
        # without the line that was cut off, or the next run would be written behind it
        if whole != text or not path.exists():
            write_atomic(path, whole.encode())

    def add(self, key: str, result: dict[str, Any]) -> None:
        append_text(self.path, json.dumps({"key": key, **result}) + "\n")
        self.runs[key] = result


def check_settings(output: Path, resume: bool, settings: Mapping[str, Any]) -> None:
    """Raise where going on would mix runs of different settings.

    Args:
        output: results of the runs that are there.
        settings: those that decide about every run, as they are now; a file that names no start has the embedded one.

    Raises:
        ConfigError: the runs were made with other ones; names them.
    """
    if not (resume and output.is_file()):
        return
    then, now = (
        {"start": asdict(Start()), "equal_compute": False} | json.loads(output.read_text())["config"],
        json.loads(json.dumps(settings)),
    )
    if "scope" in then:  # a file that names no dtype is of float32
        then["scope"] = {"dtype": "float32"} | then["scope"]
    if differing := [f"{n} was {then.get(n)}, is {value}" for n, value in now.items() if then.get(n) != value]:
        raise ConfigError(f"--resume {output}: {'; '.join(differing)}; choose another --output")


def save_results(path: Path, results: Mapping[str, Any]) -> None:
    """JSON in the order of its keys, which is the order of the tables; a reader never sees half of it."""
    write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())


class Workers:
    """``count`` processes that each hold one worker, built by ``build(*arguments)``; a context manager.

    The numbers do not depend on how many there are: each has one thread. A single worker is built in this process. Workers
    die with this process; an exception of a job is raised here, and jobs that were not begun are dropped then.
    """

    def __init__(self, count: int, build: Callable[..., Any], *arguments: Any) -> None:
        self.count, self.build, self.arguments = count, build, arguments
        self.pool: ProcessPoolExecutor | None = None
        self.context = ExitStack()

    def __enter__(self) -> Workers:
        if self.count == 1:
            self.context.enter_context(quiet_libraries())
            self.context.enter_context(one_thread())
            self.worker = self.build(*self.arguments)
        else:
            spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and locks
            self.pool = ProcessPoolExecutor(self.count, spawn, _start, (self.build, self.arguments))
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            cut_off = error[0] is not None and not issubclass(error[0], Exception)
            for process in list((self.pool._processes or {}).values()) if cut_off else ():
                process.kill()  # a signal asks for the end now, and shutdown would wait for the jobs under way
            self.pool.shutdown(wait=not cut_off, cancel_futures=True)
        self.context.close()

    def run(self, jobs: Sequence[KeyedJob], log: RunLog, on_done: Callable[[KeyedJob], None]) -> list[dict[str, Any]]:
        """The results of all jobs, in their order; those in the log are not run again."""

        def save(job: KeyedJob, result: dict[str, Any]) -> None:
            log.add(job.key, result)
            on_done(job)

        self.map([job for job in jobs if job.key not in log.runs], save)
        return [log.runs[job.key] for job in jobs]

    def map(self, jobs: Sequence[Hashable], on_done: Callable[[Any, Any], None]) -> list[Any]:
        """The results of all jobs, in their order; ``on_done`` gets each job and its result as it comes."""
        found: dict[Hashable, Any] = {}
        for job, result in self._finished(jobs):
            found[job] = result
            on_done(job, result)
        return [found[job] for job in jobs]

    def _finished(self, jobs: Sequence[Hashable]) -> Iterator[tuple[Hashable, Any]]:
        if self.pool is None:
            yield from ((job, self.worker(job)) for job in jobs)
            return
        futures = {self.pool.submit(_work, job): job for job in jobs}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


_worker: Any = None


def _start(build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _worker
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a pool's worker"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the parent decides
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    silence()
    warnings.simplefilter("ignore", FutureWarning)
    _worker = build(*arguments)


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)  # a killed parent would leave its workers waiting for ever


def _work(job: Any) -> dict[str, Any]:
    return _worker(job)


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: the same sums in the same order whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Progress bars of datasets and notes of transformers off, then as they were: many trainings would fill a screen."""
    undo = silence()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        undo()


def silence() -> Callable[[], None]:
    """``quiet_libraries`` for the rest of a process, but for warnings; what is returned undoes it."""
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()

    def undo() -> None:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()

    return undo
