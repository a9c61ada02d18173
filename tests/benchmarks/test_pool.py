"""Jobs in several processes."""

from __future__ import annotations

import os

import pytest
import torch

from qtarget.benchmarks.pool import run_jobs


def where(job: int) -> tuple[int, int, int]:
    if job < 0:
        raise ValueError(f"job {job} is below zero")
    return job * job, os.getpid(), torch.get_num_threads()


def test_processes_of_one_thread_find_what_one_process_finds():
    told = []
    apart = run_jobs(where, [3, 1, 2], 2, lambda done, job, result: told.append((done, job, result)))
    here = run_jobs(where, [3, 1, 2], 1, lambda *_: None)
    assert {job: square for job, (square, _, _) in apart.items()} == {3: 9, 1: 1, 2: 4}
    assert {job: square for job, (square, _, _) in here.items()} == {3: 9, 1: 1, 2: 4}
    assert {pid for _, pid, _ in here.values()} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid, _ in apart.values()}
    assert {threads for _, _, threads in apart.values()} == {1}
    assert [done for done, _, _ in told] == [1, 2, 3]
    assert {job: result for _, job, result in told} == apart


def test_a_failed_job_is_raised_and_the_rest_is_not_begun():
    done: list[int] = []
    with pytest.raises(ValueError, match="job -1 is below zero"):
        run_jobs(where, [-1, *range(500)], 2, lambda _, job, result: done.append(job))
    assert len(done) < 500
