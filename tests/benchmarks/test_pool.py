"""Runs in several processes, and the file of finished ones."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from qtarget.benchmarks.pool import RunLog, Workers
from qtarget.core.errors import ConfigError


@dataclass(frozen=True)
class Job:
    number: int

    @property
    def key(self) -> str:
        return f"number {self.number}"


class Squares:
    """Says also where it ran, and how often it was built there."""

    built = 0

    def __init__(self, offset: int) -> None:
        self.offset = offset
        Squares.built += 1

    def __call__(self, job: Job) -> dict[str, int]:
        if job.number < 0:
            raise ValueError(f"number {job.number} is below zero")
        return {
            "value": job.number**2 + self.offset,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "built": Squares.built,
        }


JOBS = [Job(3), Job(1), Job(2)]


@pytest.mark.parametrize("count", [1, 2])
def test_jobs_run_in_workers_of_one_thread_that_are_built_once(count):
    Squares.built, told = 0, []
    with Workers(count, Squares, 10) as workers:
        found = workers.map(JOBS, lambda job, result: told.append((job, result)))
    assert [result["value"] for result in found] == [19, 11, 14]
    assert {result["threads"] for result in found} == {1} and {result["built"] for result in found} == {1}
    assert (os.getpid() in {result["pid"] for result in found}) == (count == 1)
    assert sorted(job.number for job, _ in told) == [1, 2, 3]
    assert all(result == found[JOBS.index(job)] for job, result in told)


def test_a_failed_job_is_raised_and_the_rest_is_not_begun():
    done = []
    with pytest.raises(ValueError, match="number -1 is below zero"), Workers(2, Squares, 0) as workers:
        workers.map([Job(-1), *map(Job, range(500))], lambda job, _: done.append(job))
    assert len(done) < 500


def test_finished_runs_are_not_run_again(tmp_path):
    path = tmp_path / "a.runs.jsonl"
    with Workers(1, Squares, 0) as workers:
        workers.run(JOBS[:2], RunLog(path, resume=False), lambda _: None)
    path.write_text(path.read_text() + '{"key": "number 2", "val')  # killed while it wrote
    log, run = RunLog(path, resume=True), []
    assert log.runs.keys() == {"number 3", "number 1"}
    with Workers(1, Squares, 1000) as workers:
        found = workers.run(JOBS, log, run.append)
    assert run == [Job(2)]
    assert [result["value"] for result in found] == [9, 1, 1004]
    assert RunLog(path, resume=True).runs.keys() == {"number 3", "number 1", "number 2"}


def test_runs_of_another_benchmark_are_not_written_over(tmp_path):
    path = tmp_path / "a.runs.jsonl"
    RunLog(path, resume=False).add("x", {"value": 1})
    with pytest.raises(ConfigError, match="--resume"):
        RunLog(path, resume=False)
    path.write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match=":1 is no finished run"):
        RunLog(path, resume=True)
