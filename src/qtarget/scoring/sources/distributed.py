"""Many processes with Ray: shards that are scored with Ray Data, and functions that are called.

Of shards Ray maps the content and nothing else: ``write_cache`` decides which shards there are, writes each as it comes
back, and resumes. So a killed actor costs the shard it had (Ray gives it to another), a killed driver costs the shards
under way, and the files are those of a run in one process.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Self

from qtarget.core.errors import (
    CacheMismatchError,
    HyperparameterError,
    MissingDependencyError,
    QTargetError,
    ScoringServerError,
)
from qtarget.scoring.cache.rows import IntArray, Row, ScoredRow, check_request
from qtarget.scoring.cache.schema import Provenance, fingerprint_model
from qtarget.scoring.cache.writer import shard_content
from qtarget.scoring.sources.local import LocalSource
from qtarget.storage.models import load_whole

PATIENCE = 10.0
"""Seconds in which a cluster's address must take a connection."""
Load = Callable[[], Any]
"""Gives the model; travels to the workers, so it is a module's function or a ``functools.partial`` of one."""


def load_model(name: str, **kwargs: Any) -> Any:
    """A causal model, whole and frozen, on the GPU that Ray gave this process, if any."""
    import torch

    model: Any = load_whole("model", name, **kwargs)
    # Ray shows a worker its own GPUs alone, and none where it was given none
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


def checked_source(load: Load, fingerprint: str, options: dict[str, Any]) -> LocalSource:
    """A source of one model, which must be the one that was named.

    Raises:
        CacheMismatchError: it is another.
    """
    model = load()
    if (found := fingerprint_model(model)) != fingerprint:
        raise CacheMismatchError(
            f"a worker loads a model with fingerprint {found}, expected {fingerprint}; give every machine the same files"
        )
    return LocalSource(model, **options)


class Worker:
    """An actor that has a source; called by Ray Data with one shard, or asked to ``score`` like any source.

    Args:
        make: a reference to what gives the source, in a list: Ray would look up a bare one by itself.
        threads: of torch, in this process.
        shards: references to the rows and the plan of each shard; a worker fetches what it scores.
    """

    def __init__(self, make: Sequence[Any], threads: int, shards: Sequence[Any] = ()) -> None:
        self._make, self._threads, self._shards = make, threads, shards
        self._made: Any = None

    def _source(self) -> Any:
        """Made when first needed: an error in an actor's constructor would reach the driver as text alone."""
        if self._made is None:
            import torch

            torch.set_num_threads(self._threads)
            self._made = _import_ray().get(self._make[0])()
        return self._made

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The content of the one shard named in a batch of Ray Data, or our own error: Ray would hand it on as text."""
        rows, plan = _import_ray().get(self._shards[batch["id"][0]])
        try:
            # a memoryview cannot travel between processes
            content, error = bytes(shard_content(rows, self._source(), plan)), b""
        except QTargetError as raised:
            content, error = b"", pickle.dumps(raised)
        return {"id": batch["id"], "content": [content], "error": [error]}

    def score(self, *arguments: Any, **named: Any) -> list[ScoredRow]:
        """``LocalSource.score``."""
        return self._source().score(*arguments, **named)


@dataclass(frozen=True)
class Processes:
    """Processes that Ray starts, here or on a cluster.

    Attributes:
        workers: at most so many at once.
        address: of a running cluster (``host:6379``, ``auto``, ``ray://host:10001``); absent: this machine alone.
        gpus: share of a GPU each; absent: one if the cluster has any, else none.

    Raises:
        HyperparameterError: ``workers`` is not positive.
        MissingDependencyError: Ray is not installed.
    """

    workers: int = 1
    address: str | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise HyperparameterError(f"workers={self.workers}; expected at least 1")
        _import_ray()

    def connected(self) -> AbstractContextManager[None]:
        """See ``connected``."""
        return connected(self.address, self.workers)

    def resources(self) -> dict[str, float]:
        """What each asks of the cluster that this process is connected to."""
        has_gpu = bool(_import_ray().cluster_resources().get("GPU"))
        return {"num_cpus": 1, "num_gpus": float(has_gpu) if self.gpus is None else self.gpus}

    def threads(self, side_by_side: int) -> int:
        """Of torch in each of so many, one part left for the driver."""
        return max(1, int(_import_ray().cluster_resources().get("CPU", 1)) // (side_by_side + 1))

    def share(self, value: Any) -> Any:
        """A reference to a value, once for all calls that are given it; they get the value."""
        return _import_ray().put(value)

    def run(
        self,
        task: Callable[..., Any],
        count: int,
        arguments: Callable[[int], tuple[Any, ...]],
        waiting: Callable[[], None] = lambda: None,
        of: int | None = None,
    ) -> Generator[tuple[int, Any]]:
        """The number and result of each of so many calls of a module's function, as it ends; close it to give up the others.

        A process that dies is replaced, three times.

        Args:
            arguments: gives those of a call when its turn comes.
            waiting: called about once a second.
            of: calls in all, where others were made before: the threads of each, and so its last bits, are those of all.

        Raises:
            ScoringServerError: a process died again and again.
            Exception: what a call raised; the others are given up.
        """
        if not count:
            return
        ray = _import_ray()
        with self.connected():
            at_once = min(self.workers, count)
            # not by `options`: only so does a process that had a GPU end after its call, and lets the memory go (Ray 2.60)
            remote = ray.remote(**self.resources())(_threaded)
            ask = partial(remote.remote, self.threads(min(self.workers, of or count)), task)
            coming = iter(range(count))
            under_way = {ask(*arguments(number)): number for number in islice(coming, at_once)}
            try:
                while under_way:
                    ended, _ = ray.wait(list(under_way), timeout=1)
                    waiting()
                    for reference in ended:
                        result, number = _result(reference), under_way.pop(reference)
                        under_way |= {ask(*arguments(after)): after for after in islice(coming, 1)}
                        yield number, result
            finally:
                for reference in under_way:
                    ray.cancel(reference, force=True)


def _threaded(threads: int, task: Callable[..., Any], *arguments: Any) -> Any:
    import torch

    torch.set_num_threads(threads)
    return task(*arguments)


def _result(reference: Any) -> Any:
    """What a task or an actor returned, or the error that it raised, as itself."""
    ray = _import_ray()
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ScoringServerError(
            f"a process of Ray died again and again ({first_line(error)}); most often memory is short: take fewer workers, or "
            "smaller batches; what is finished is kept"
        ) from error


class SourcePool:
    """See ``qtarget.scoring.Source`` and ``ShardMapper``; a context, if ``score`` is used: it keeps its workers.

    Args:
        make: gives the source, in each worker; travels there, so it is a module's function or a ``functools.partial``.
        vocab_size: rows of the head.
        processes: where the workers are, and how many.
    """

    def __init__(self, make: Callable[[], Any], vocab_size: int, processes: Processes) -> None:
        self._make, self._vocab_size, self._processes = make, vocab_size, processes
        self._held = ExitStack()
        self._actors: list[Any] = []
        self._arguments: tuple[list[Any], int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the workers of ``score`` go."""
        self._actors.clear()
        self._arguments = None
        self._held.close()

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, as given."""
        return self._vocab_size

    def map_shards(self, work: Iterator[tuple[int, list[Row]]], plan: Provenance) -> Iterator[tuple[int, bytes]]:
        """See ``ShardMapper``; all work is read before the first shard is scored.

        Raises:
            QTargetError: what a worker raised.
        """
        ray, workers = _import_ray(), self._processes.workers
        if (first := next(work, None)) is None:
            return
        with self._processes.connected():
            # into the object store as they are read: this process holds one shard's rows at a time
            numbers, shards = [], []
            for number, rows in chain([first], work):
                numbers.append(number)
                shards.append(ray.put((rows, plan)))
            dataset = (
                ray.data.range(len(shards))
                # a block is what a killed actor's successor does again; override_num_blocks would not cut it so small
                .repartition(target_num_rows_per_block=1)
                .map_batches(
                    Worker,
                    fn_constructor_args=(*self._worker_arguments(), shards),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=min(workers, len(shards))),
                    **self._processes.resources(),
                )
            )
            for row in dataset.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
                yield numbers[row["id"]], row["content"]

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``; every worker gets an equal part of the rows.

        Raises:
            QTargetError: what a worker raised.
        """
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, self.vocab_size)
        if not rows:
            return []
        ray, workers = _import_ray(), self._processes.workers
        if not self._actors:
            self._held.enter_context(self._processes.connected())
            # -1, without limit: a worker that was killed starts again and is asked again
            actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=-1, **self._processes.resources())
            # kept, for what a restarted worker is made from must still be there
            self._arguments = self._worker_arguments()
            self._actors = [actor.remote(*self._arguments) for _ in range(workers)]
        bounds = [len(rows) * i // workers for i in range(workers + 1)]
        asked = [
            actor.score.remote(rows[a:b], top_k, candidate_ids, positions=places[a:b])
            for actor, a, b in zip(self._actors, bounds, bounds[1:], strict=False)
        ]
        return [scored for part in _result(asked) for scored in part]

    def _worker_arguments(self) -> tuple[list[Any], int]:
        # by reference: a source may carry the folds of a million rows
        return [_import_ray().put(self._make)], self._processes.threads(self._processes.workers)


class RaySource(SourcePool):
    """One model in many processes.

    Args:
        load: gives the model, in each worker.
        fingerprint: of the model.
        vocab_size: rows of its head.
        workers: processes; each holds a copy of the model.
        address, gpus_per_worker: see ``Processes``.
        options: of ``LocalSource``: ``logit_scale``, ``logit_softcap``, ``tokens_per_batch``.

    Raises:
        MissingDependencyError: Ray is not installed.
        HyperparameterError: ``workers`` is not positive.
    """

    def __init__(
        self,
        load: Load,
        *,
        fingerprint: str,
        vocab_size: int,
        workers: int = 1,
        address: str | None = None,
        gpus_per_worker: float | None = None,
        **options: Any,
    ) -> None:
        make = partial(checked_source, load, fingerprint, options)
        super().__init__(make, vocab_size, Processes(workers, address, gpus_per_worker))


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[None]:
    """Ray as it runs already in this process, else connected to ``address``, else started on this machine; undone after.

    A local one gets a core more than there are workers: Ray Data's own tasks need one and would wait forever for it.

    Raises:
        ScoringServerError: nobody answers at the address.
    """
    ray = _import_ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress is ours to show
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is None:
        cores = max(workers + 1, os.cpu_count() or 1)
        # `local`: without it Ray joins what RAY_ADDRESS or an earlier `ray start` names, and refuses `num_cpus`
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
    else:
        _join(address, quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _join(address: str, options: dict[str, Any]) -> None:
    """Connect to a running cluster."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdecimal():
            # Ray itself asks a dead address for minutes (2.60: more than five)
            socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
        _import_ray().init(address=address, **options)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise ScoringServerError(
            f"no Ray cluster answers at {address!r} ({first_line(error)}); expected the HOST:PORT that `ray start --head` printed; "
            "check that it runs, or leave the address out for processes of this machine"
        ) from error


def first_line(error: BaseException) -> str:
    """Of its message, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise MissingDependencyError("scoring with Ray needs Ray Data; run `pip install 'qtarget[ray]'`") from error
    return ray
