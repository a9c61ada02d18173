"""Score shards on many processes with Ray Data.

Ray maps shards and nothing else: ``write_cache`` decides which shards there are, writes each as it comes back, and resumes.
So a killed actor costs the shard it had (Ray gives it to another), a killed driver costs the shards under way, and the
files are those of a run in one process.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from qtarget.core.errors import CacheMismatchError, HyperparameterError, MissingDependencyError, QTargetError
from qtarget.scoring.cache.rows import IntArray, Row, ScoredRow, check_request
from qtarget.scoring.cache.schema import Provenance, fingerprint_model
from qtarget.scoring.cache.writer import shard_content
from qtarget.scoring.sources.local import LocalSource
from qtarget.storage.models import load_whole

Load = Callable[[], Any]
"""Gives the model; travels to the workers, so it is a module's function or a ``functools.partial`` of one."""


def load_model(name: str, **kwargs: Any) -> Any:
    """A causal model, whole and frozen, on the GPU that Ray gave this process, if any."""
    import torch

    model: Any = load_whole("model", name, **kwargs)
    # Ray shows a worker its own GPUs alone, and none where it was given none
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)


class Worker:
    """An actor that has the model; called by Ray Data with one shard, or asked to ``score`` like any source.

    Args:
        load: gives the model.
        fingerprint: what the model must be.
        threads: of torch, in this process.
        options: of ``LocalSource``.
        shards: references to the rows and the plan of each shard; a worker fetches what it scores.
    """

    def __init__(
        self, load: Load, fingerprint: str, threads: int, options: dict[str, Any], shards: Sequence[Any] = ()
    ) -> None:
        self._load, self._fingerprint, self._threads, self._options = load, fingerprint, threads, options
        self._shards = shards
        self._loaded: LocalSource | None = None

    def _source(self) -> LocalSource:
        """Loaded when first needed: an error in an actor's constructor would reach the driver as text alone."""
        if self._loaded is None:
            import torch

            torch.set_num_threads(self._threads)
            model = self._load()
            if (found := fingerprint_model(model)) != self._fingerprint:
                raise CacheMismatchError(
                    f"a worker loads a model with fingerprint {found}, expected {self._fingerprint}; give every machine the "
                    "same files"
                )
            self._loaded = LocalSource(model, **self._options)
        return self._loaded

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


class RaySource:
    """See ``qtarget.scoring.Source`` and ``ShardMapper``; a context, if ``score`` is used: it keeps its workers.

    Args:
        load: gives the model, in each worker.
        fingerprint: of the model.
        vocab_size: rows of its head.
        workers: processes; each holds a copy of the model.
        address: of a running cluster (``host:6379``, ``auto``, ``ray://host:10001``); absent: this machine alone.
        gpus_per_worker: share of a GPU each; default: one if the cluster has any, else none.
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
        if workers < 1:
            raise HyperparameterError(f"workers={workers}; expected at least 1")
        _import_ray()
        self._load, self._fingerprint, self._options = load, fingerprint, options
        self._vocab_size = vocab_size
        self._workers, self._address, self._gpus = workers, address, gpus_per_worker
        self._held = ExitStack()
        self._actors: list[Any] = []

    def __enter__(self) -> RaySource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the workers of ``score`` go."""
        self._actors.clear()
        self._held.close()

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head, as given."""
        return self._vocab_size

    def map_shards(self, work: Iterator[tuple[int, list[Row]]], plan: Provenance) -> Iterator[tuple[int, bytes]]:
        """See ``ShardMapper``.

        Raises:
            QTargetError: what a worker raised.
        """
        ray = _import_ray()
        with connected(self._address, self._workers):
            # into the object store as they are read: this process holds one shard's rows at a time
            numbers, shards = [], []
            for number, rows in work:
                numbers.append(number)
                shards.append(ray.put((rows, plan)))
            if not shards:
                return
            dataset = (
                ray.data.range(len(shards))
                # a block is what a killed actor's successor does again; override_num_blocks would not cut it so small
                .repartition(target_num_rows_per_block=1)
                .map_batches(
                    Worker,
                    fn_constructor_args=(*self._worker_arguments(), shards),
                    batch_size=1,
                    compute=ray.data.ActorPoolStrategy(size=min(self._workers, len(shards))),
                    **self._resources(),
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
        ray = _import_ray()
        if not self._actors:
            self._held.enter_context(connected(self._address, self._workers))
            # -1, without limit: a worker that was killed starts again and is asked again
            actor = ray.remote(Worker).options(max_restarts=-1, max_task_retries=-1, **self._resources())
            self._actors = [actor.remote(*self._worker_arguments()) for _ in range(self._workers)]
        bounds = [len(rows) * i // self._workers for i in range(self._workers + 1)]
        asked = [
            actor.score.remote(rows[a:b], top_k, candidate_ids, positions=places[a:b])
            for actor, a, b in zip(self._actors, bounds, bounds[1:], strict=False)
        ]
        try:
            parts = ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        return [scored for part in parts for scored in part]

    def _worker_arguments(self) -> tuple[Load, str, int, dict[str, Any]]:
        cores = int(_import_ray().cluster_resources().get("CPU", 1))
        return self._load, self._fingerprint, max(1, cores // (self._workers + 1)), self._options

    def _resources(self) -> dict[str, float]:
        has_gpu = bool(_import_ray().cluster_resources().get("GPU"))
        return {"num_cpus": 1, "num_gpus": float(has_gpu) if self._gpus is None else self._gpus}


@contextmanager
def connected(address: str | None, workers: int) -> Iterator[None]:
    """Ray as it runs already in this process, else connected to ``address``, else started on this machine; undone after.

    A local one gets a core more than there are workers: Ray Data's own tasks need one and would wait forever for it.
    """
    ray = _import_ray()
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its progress is ours to show
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    if address is None:
        cores = max(workers + 1, os.cpu_count() or 1)
        ray.init(num_cpus=cores, include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise MissingDependencyError("scoring with Ray needs Ray Data; run `pip install 'qtarget[ray]'`") from error
    return ray
