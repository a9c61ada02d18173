"""Many small jobs in several processes of one thread each; the numbers do not depend on how many."""

from __future__ import annotations

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

Job = TypeVar("Job", bound=Hashable)
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int, on_done: Callable[[int, Job, Result], None]
) -> dict[Job, Result]:
    """Do every job, in ``workers`` processes (in this one if it is 1).

    An exception of a job is raised here; jobs that were not begun are dropped then. Workers die with this process.

    Args:
        work: a function of a module, or an object that can be pickled; each process gets its copy once.
        jobs: each once.
        on_done: called here after each job with how many are done, the job and its result.

    Example:
        >>> run_jobs(abs, [-2, 3], 1, lambda done, job, result: print(done, job, result))
        1 -2 2
        2 3 3
        {-2: 2, 3: 3}
    """
    found: dict[Job, Result] = {}
    if workers == 1:
        for job in jobs:
            found[job] = work(job)
            on_done(len(found), job, found[job])
        return found
    if not jobs:
        return found
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and locks
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, _start_worker, (work,)) as pool:
        futures = {pool.submit(_work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                found[job] = future.result()
                on_done(len(found), job, found[job])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


_worker: Any = None
_silence = ExitStack()  # held for the life of a worker: a forgotten context manager is closed when it is collected


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _worker
    import torch

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a pool's worker"
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _silence.enter_context(quiet_libraries())
    _worker = work


def _follow(parent: Any) -> None:
    parent.join()
    os._exit(1)  # a killed parent would leave its workers waiting for ever


def _work(job: Any) -> Any:
    assert _worker is not None, "the pool's initializer ran"
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
    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
