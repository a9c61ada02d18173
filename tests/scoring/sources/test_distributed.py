"""Ray Data over shards, on one small Ray for the whole file: killed actors, killed drivers, the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("ray.data")

import ray

from qtarget.core.errors import CacheMismatchError, HyperparameterError, NonFiniteLossError, ScoringServerError
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.scoring.cache.writer import write_cache
from qtarget.scoring.sources.distributed import Processes, RaySource, connected, load_model
from qtarget.scoring.sources.local import LocalSource
from tests.scoring.helpers import VOCAB, contents, provenance, ragged_rows, tiny_model
from tests.scoring.sources.source_suite import SourceSuite

SMALL_STORE = 100 * 2**20
ROW_BY_ROW = {"tokens_per_batch": 1}
"""Slow on purpose, so that a kill finds work under way."""


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray of three cores that runs on this machine."""
    information = ray.init(
        num_cpus=3, object_store_memory=SMALL_STORE, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield information.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return str(path)


def ray_source(path, **named) -> RaySource:
    named = {"fingerprint": fingerprint_model(tiny_model()), "vocab_size": VOCAB, "workers": 2, **named}
    return RaySource(partial(load_model, path), **named)


class TestRay(SourceSuite):
    @pytest.fixture(scope="class")
    def source(self, cluster, model_path):
        with ray_source(model_path) as source:
            yield source


@pytest.fixture(scope="module")
def rows():
    return ragged_rows(1200, seed=2)


@pytest.fixture(scope="module")
def undisturbed(rows, model_path, tmp_path_factory):
    """The files of one process, whose model comes from the same file: where weights lie in memory decides last bits."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("undisturbed")
    write_cache(path, rows, LocalSource(load_model(model_path), **ROW_BY_ROW), provenance(3), shard_rows=100)
    return contents(path)


def finished(path) -> int:
    return len(list(path.glob("shard-*.parquet")))


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def drive(path, model_path, address, rows):
    """What the killed driver runs."""
    source = ray_source(model_path, address=address, **ROW_BY_ROW)
    write_cache(path, rows, source, provenance(3), shard_rows=100)


@pytest.mark.nightly
def test_a_killed_driver_and_then_a_killed_actor_leave_no_trace(cluster, model_path, rows, undisturbed, tmp_path):
    # a new interpreter: Ray has put its token into this one's environment, and a fork server may be older
    process = multiprocessing.get_context("spawn").Process(target=drive, args=(tmp_path, model_path, cluster, rows))
    process.start()
    wait_for(lambda: finished(tmp_path) >= 2 or not process.is_alive())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.parquet")}
    assert 2 <= len(kept) < 8
    others = actors()
    killed = []

    def kill_one():
        wait_for(lambda: finished(tmp_path) > len(kept))
        actor = next(process for process in actors() if process not in others)
        actor.kill()
        killed.append(finished(tmp_path))

    killer = threading.Thread(target=kill_one)
    killer.start()
    write_cache(tmp_path, rows, ray_source(model_path, **ROW_BY_ROW), provenance(3), shard_rows=100)
    killer.join()
    assert killed and killed[0] < 12, "the actor was killed when all was done"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept, "a finished shard was written again"
    assert contents(tmp_path) == undisturbed


def actors() -> list[psutil.Process]:
    """Processes of Ray Data's actors, of this user."""
    found = []
    for process in psutil.process_iter(["cmdline", "uids"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::MapWorker") and process.info["uids"].real == os.getuid():
            found.append(process)
    return found


def test_a_model_that_is_not_the_one_that_was_named_is_refused(cluster, model_path):
    with (
        pytest.raises(CacheMismatchError, match="expected other"),
        ray_source(model_path, fingerprint="other") as other,
    ):
        other.score([np.array([1, 2])], 0)
    with pytest.raises(HyperparameterError, match="workers=0"):
        ray_source(model_path, workers=0)


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "refused"), ("ray://127.0.0.1:1", "refused"), ("nonsense", "Invalid address")],
)
def test_a_cluster_that_does_not_answer_is_an_error_at_once(address, words, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    with (
        pytest.raises(ScoringServerError, match=rf"no Ray cluster answers at '{address}' \(.*{words}"),
        connected(address, 1),
    ):
        pass


@pytest.mark.nightly
def test_what_a_worker_raises_is_ours(cluster, model_path, tmp_path):
    with pytest.raises(CacheMismatchError, match="a worker loads a model with fingerprint"):
        write_cache(tmp_path / "a", ragged_rows(4), ray_source(model_path, fingerprint="other"), provenance(0))
    broken = tiny_model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(3e38)  # numbers, so it loads, and its logits are infinite
    broken.save_pretrained(tmp_path / "broken")
    source = ray_source(str(tmp_path / "broken"), fingerprint=fingerprint_model(broken))
    with pytest.raises(NonFiniteLossError, match="NaN or infinite at position"):
        write_cache(tmp_path / "b", ragged_rows(4), source, provenance(0))
    assert not list((tmp_path / "b").glob("shard*.parquet"))


@pytest.mark.nightly
def test_without_an_address_it_starts_and_stops_its_own(model_path, tmp_path, monkeypatch):
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster
    write_cache(tmp_path, ragged_rows(6), ray_source(model_path), provenance(3), shard_rows=4)
    assert not ray.is_initialized()
    with connected(None, 1):
        assert ray.cluster_resources()["CPU"] >= 2
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_process_that_had_a_gpu_ends_after_its_call():
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        "local", num_cpus=2, num_gpus=1, object_store_memory=SMALL_STORE, include_dashboard=False
    )  # Ray only counts it
    try:
        for gpus, processes in ((0.0, 1), (1.0, 3)):
            found = dict(Processes(1, gpus=gpus).run(os.getpid, 3, lambda _: ()))
            assert sorted(found) == [0, 1, 2] and len(set(found.values())) == processes
    finally:
        ray.shutdown()
