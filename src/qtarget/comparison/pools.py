"""Where jobs run: processes of this machine, one a GPU or a core, or actors of a Ray cluster."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Protocol

from qtarget.benchmarks.pool import Workers, one_thread, quiet_libraries
from qtarget.comparison.jobs import Job
from qtarget.comparison.worker import ComparisonWorker, Setting
from qtarget.core.errors import ConfigError

Engine = Literal["local", "ray"]
OnDone = Callable[[Job, dict[str, Any]], None]
GPUS = "CUDA_VISIBLE_DEVICES"


class Pool(Protocol):
    """Runs jobs and tells of each result as it comes."""

    def map(self, jobs: Sequence[Job], on_done: OnDone) -> Any: ...


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` takes them."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get(GPUS, "").split(",") if name]
    return (named or [str(i) for i in range(count)])[:count]


def at_once_here(gpus: Sequence[str]) -> int:
    """Processes that this machine has room for: one a GPU, else one a core."""
    return len(gpus) or len(os.sched_getaffinity(0))


@contextmanager
def pool(engine: Engine, count: int, gpus: Sequence[str], setting: Setting, address: str | None) -> Iterator[Pool]:
    """A pool of ``count`` workers, gone at the end of the block.

    Args:
        gpus: handed out in turn; none: the workers compute on the CPU, one thread each.
        address: of a running Ray cluster; absent: this machine.

    Raises:
        ConfigError: a worker process died.
        MissingDependencyError: Ray is not installed.
    """
    if engine == "ray":
        with RayPool(count, setting, address) as found:
            yield found
        return
    names: Any = None
    if gpus and count > 1:
        import multiprocessing

        names = multiprocessing.get_context("spawn").Queue()
        for i in range(count):
            names.put(gpus[i % len(gpus)])
    try:
        with Workers(count, build_worker, setting, names) as workers:
            yield workers
    except BrokenProcessPool as error:
        raise ConfigError(
            f"a worker process died, most likely for want of memory; finished runs are kept: go on with --resume and "
            f"--at-once {max(1, count - 1)}"
        ) from error


def build_worker(setting: Setting, gpus: Any) -> ComparisonWorker:
    """A worker with a GPU of its own, taken from a queue before CUDA starts."""
    if gpus is not None:
        os.environ[GPUS] = gpus.get()
    return ComparisonWorker(setting)


class RayActor:
    """A worker in an actor; its process is paid once for many jobs."""

    def __init__(self, setting: Setting) -> None:
        self._held = ExitStack()
        self._held.enter_context(quiet_libraries())
        self._held.enter_context(one_thread())
        self._worker = ComparisonWorker(setting)

    def run(self, job: Job) -> dict[str, Any]:
        return self._worker(job)


class RayPool:
    """``count`` actors with one core each, and one GPU each where the cluster has any.

    Every machine of the cluster needs the package, the model and the rows at the same paths.
    """

    def __init__(self, count: int, setting: Setting, address: str | None) -> None:
        self._count, self._setting, self._address = count, setting, address
        self._held = ExitStack()

    def __enter__(self) -> RayPool:
        from qtarget.scoring.sources.distributed import connected

        self._held.enter_context(connected(self._address, self._count))
        self._ray: Any = importlib.import_module("ray")  # optional
        gpus = 1 if self._ray.cluster_resources().get("GPU") else 0
        # a killed actor starts again and is given the job again
        actor = self._ray.remote(RayActor).options(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)
        self._actors = [actor.remote(self._setting) for _ in range(self._count)]
        return self

    def __exit__(self, *error: Any) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._held.close()

    def map(self, jobs: Sequence[Job], on_done: OnDone) -> list[Any]:
        """See ``Pool``."""
        waiting, free, found = list(reversed(jobs)), list(self._actors), {}
        running: dict[Any, tuple[Any, Job]] = {}
        while waiting or running:
            while waiting and free:
                actor, job = free.pop(), waiting.pop()
                running[actor.run.remote(job)] = (actor, job)
            (done,), _ = self._ray.wait(list(running), num_returns=1)
            actor, job = running.pop(done)
            free.append(actor)
            found[job] = self._ray.get(done)
            on_done(job, found[job])
        return [found[job] for job in jobs]
