"""Copies that are trained and judge in other processes: the numbers of one process, killed and gone on with; real Ray by night."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from qtarget import QTargetConfig
from qtarget.core.errors import CacheMismatchError, ConfigError
from qtarget.integrations.sft.crossfit import CrossfitRecipe, apart, copies, crossfit_score, jobs, score
from qtarget.integrations.sft.crossfit.source import CrossfitSource
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.writer import shard_content
from qtarget.scoring.contradictions import COPIES, SIDE
from qtarget.scoring.sources.distributed import Processes, SourcePool
from qtarget.scoring.sources.engines import EngineChoice
from qtarget.storage.locks import LOCK, locked, read_owner
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer

ROWS = Dataset.from_list([*make_rows(14), make_rows(14)[3]])
RAY = EngineChoice("ray", workers=2)


@pytest.fixture
def judge(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.set_num_threads(1)  # as many as a process of three cores and two workers

    def run(folder: str, engine: EngineChoice | None = None):
        args = QTargetConfig(str(tmp_path / "unused"), **SETTINGS)
        recipe = CrossfitRecipe(steps=2, learning_rate=1e-2, rank=4)
        return crossfit_score(
            str(tmp_path / "base"), args, ROWS, None, make_tokenizer(), directory=tmp_path / folder, recipe=recipe,
            progress=False, shard_rows=4, engine=engine,
        )  # fmt: skip

    return run


def travelled(value):
    return pickle.loads(pickle.dumps(value))


class Here:
    """Ray's processes without Ray: what goes there is pickled on its way, and calls end in the opposite order."""

    workers = 2

    def __init__(self):
        self.seen: list[object] = []

    @contextmanager
    def connected(self):
        try:
            yield
        finally:
            self.seen.append("left")

    def share(self, value):
        return value

    def run(self, task, count, arguments, waiting=lambda: None, of=None):
        self.seen.append((task.__name__, count, of))
        try:
            for number in reversed(range(count)):
                result = travelled(task)(*travelled(arguments(number)))
                waiting()
                yield number, result
        finally:
            self.seen.append("given up")


def mapped_here(self, work, plan):
    shards, source = list(work), travelled(self._make)()
    assert isinstance(source, CrossfitSource)
    for number, rows in reversed(shards):
        yield number, bytes(shard_content(rows, source, plan))


class Killed(BaseException):
    """A signal."""


def contents(path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != ".qtarget"}


@pytest.fixture
def pretended(monkeypatch):
    """``ray`` is ``Here``."""
    here = Here()
    monkeypatch.setattr(score, "processes_of", lambda engine: here if engine.name == "ray" else None)
    monkeypatch.setattr(SourcePool, "map_shards", mapped_here)
    return here


def test_what_travels_comes_back_as_in_one_process(judge, tmp_path, pretended):
    judge("local")
    judge("apart", RAY)
    assert contents(tmp_path / "apart") == contents(tmp_path / "local")
    assert not (tmp_path / "apart" / COPIES).exists()
    (tmp_path / "apart" / "shard-00000.parquet").unlink()
    judge("apart", RAY)  # one copy is trained again, with the threads that it had beside the other
    assert [run for run in pretended.seen if run[0] == "_train_here"] == [("_train_here", 2, 2), ("_train_here", 1, 2)]
    assert contents(tmp_path / "apart") == contents(tmp_path / "local")


def trained_elsewhere(*_: object) -> str:
    return "node-7"


def test_what_is_under_way_is_given_up_before_ray_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "VISIBLE", 0)
    monkeypatch.setattr(apart, "_train_here", trained_elsewhere)
    files = jobs.CopyFiles(tmp_path, "nowhere", 0, {})
    job = jobs.CopyJob(files, 0, QTargetConfig(str(tmp_path / "copy"), **SETTINGS), np.arange(2), None)
    here: Any = Here()
    with pytest.raises(ConfigError, match="node-7 does not share the folder"):
        apart.train_apart([job, job], ROWS, here, False, 2)
    assert here.seen == [("trained_elsewhere", 2, 2), "given up", "left"]


@pytest.mark.nightly
@pytest.mark.parametrize(("begins", "goes_on"), [(RAY, RAY), (RAY, None), (None, RAY)])
def test_a_folder_that_one_began_the_other_finishes(judge, tmp_path, monkeypatch, pretended, begins, goes_on):
    judge("undisturbed")
    real, trained = jobs.train_copy, []

    def spied(*args):
        if len(trained) == 1:
            raise Killed
        trained.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train_copy", spied)
        with pytest.raises(Killed):
            judge("begun", begins)
    kept = {path.name for path in (tmp_path / "begun" / COPIES).glob("fold-?")}
    assert kept == {"fold-0" if begins is None else "fold-1"}
    monkeypatch.setattr(jobs, "train_copy", lambda *args: (trained.append(1), real(*args))[1])
    judge("begun", goes_on)
    assert len(trained) == 2 and not (tmp_path / "begun" / COPIES).exists()
    assert contents(tmp_path / "begun") == contents(tmp_path / "undisturbed")


def killed(*_: object, **__: object) -> None:
    raise Killed


def test_a_machine_that_does_not_share_the_folder_or_has_another_copy_is_refused(tmp_path):
    files = jobs.CopyFiles(tmp_path, "nowhere", 0, {})
    job = jobs.CopyJob(files, 0, QTargetConfig(str(tmp_path / "copy"), **SETTINGS), np.arange(2), None)
    for owner in (None, "another driver"):
        with pytest.raises(ConfigError, match=r"does not share the folder .*--output DIR"):
            apart._train_here(job, None, None, owner)
    assert not list(tmp_path.iterdir())  # nothing is left on the machine
    told = apart.Judge(files, ("other", "other"), {})
    with pytest.raises(ConfigError, match="does not share the folder"):
        told(0)
    make_model().save_pretrained(tmp_path / "fold-1")
    (tmp_path / "fold-1" / jobs.RECEIPT).write_text("{}")
    with pytest.raises(CacheMismatchError, match="copy of fold 2 with fingerprint"):
        told(1)


def test_a_server_has_no_copies(judge):
    with pytest.raises(ConfigError, match="expected engine local or ray"):
        judge("w", EngineChoice("vllm", "http://localhost:1"))


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    store = 100 * 2**20
    ray.init(num_cpus=3, object_store_memory=store, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.nightly
def test_ray_trains_judges_and_asks_as_one_process_does(cluster, judge, tmp_path, monkeypatch):
    local = judge("local")
    with monkeypatch.context() as patch:
        patch.setattr(score, "write_judged", killed)
        with pytest.raises(Killed):
            judge("ray", RAY)
    receipts = sorted((tmp_path / "ray" / COPIES).glob(f"fold-?/{jobs.RECEIPT}"))
    before = [receipt.stat().st_mtime_ns for receipt in receipts]
    assert len(before) == 2
    with monkeypatch.context() as patch:
        patch.setattr(score, "write_contradictions", killed)
        with pytest.raises(Killed):
            judge("ray", RAY)
    assert [receipt.stat().st_mtime_ns for receipt in receipts] == before  # no copy is trained again
    found = judge("ray", RAY)
    facts = [{k: v for k, v in manifest.crossfit.items() if k != "copies"} for manifest in (found, local)]
    assert facts[0] == facts[1]
    assert (found.engine, found.engine_version, found.rows) == (local.engine, local.engine_version, local.rows)
    caches = [ReferenceCache.open(tmp_path / name) for name in ("ray", "local")]
    names = sorted(caches[1].checksums())
    for index, other in zip(*(cache.locate(names) for cache in caches), strict=True):
        numbers = [cache.row(n)["label_log_probs"] for cache, n in zip(caches, (index, other), strict=True)]
        np.testing.assert_allclose(*numbers, atol=1e-5)
    told = [np.load(tmp_path / name / SIDE) for name in ("ray", "local")]
    assert (told[0]["checksums"] == told[1]["checksums"]).all()
    np.testing.assert_allclose(told[0]["values"], told[1]["values"], atol=1e-4)
    # a copy that the finished cache let go is made again for a shard that is lost, and no other
    assert not (tmp_path / "ray" / COPIES).exists()
    shard = tmp_path / "ray" / "shard-00000.parquet"
    whole = shard.read_bytes()
    shard.unlink()
    with monkeypatch.context() as patch:
        asked, real = [], apart.train_apart
        patch.setattr(copies, "train_apart", lambda jobs, *rest: (asked.extend(jobs), real(jobs, *rest)))
        judge("ray", RAY)
    assert [job.fold for job in asked] == [0]
    assert shard.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.nightly
def test_an_error_in_a_process_of_ray_is_ours(cluster, tmp_path):
    files = jobs.CopyFiles(tmp_path, "nowhere", 0, {})
    job = jobs.CopyJob(files, 0, QTargetConfig(str(tmp_path / "copy"), **SETTINGS), np.arange(2), None)
    with locked(tmp_path):
        another = replace(read_owner(tmp_path / LOCK), token="another driver")
        with pytest.raises(ConfigError, match="does not share the folder"):
            list(Processes(2).run(apart._train_here, 2, lambda _: (job, None, None, another)))
    assert not (tmp_path / "fold-0").exists()
