"""A run that learns nothing says so once; one that learns, or has learned, says nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qtarget.integrations.shared.records.watch import NotLearning, finding

ARGS = SimpleNamespace(get_warmup_steps=lambda steps: 0)


def lines(nll, weight=1.0, effective=1.0):
    return [{"loss": 1.0, "nll": value, "label_weight": weight, "effective_sample_size": effective} for value in nll]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (lines([6.4] * 6, 0.01, 0.03), "ways out: target: consensus, guard: true"),
        (lines([6.4] * 6), "try another learning_rate"),
        (lines([6.4, 6.0, 5.5, 5.0, 4.5, 4.0], 0.01, 0.03), None),
        (lines([6.4, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]), None),
        (lines([0.3] * 6, 0.01), None),
        (lines([6.4] * 4, 0.01), None),
    ],
)
def test_only_a_flat_run_far_from_done_is_told(log, words):
    found = finding(log, "dft", False, 60)
    assert found is None if words is None else words in found


def test_it_is_said_once_and_by_one_rank():
    state = SimpleNamespace(is_world_process_zero=True, global_step=50, max_steps=100)
    watch = NotLearning("dft", guarded=True)
    for line in lines([6.4] * 20, 0.01):
        watch.on_log(ARGS, state, None, logs=line)
    assert len(watch.said) == 1
    early = NotLearning("dft", guarded=True)
    for line in lines([6.4] * 20, 0.01):
        early.on_log(ARGS, SimpleNamespace(is_world_process_zero=True, global_step=20, max_steps=100), None, logs=line)
    assert early.said == []
    assert "guard: true" not in watch.said[0]
    other = NotLearning("dft", guarded=False)
    for line in lines([6.4] * 20, 0.01):
        other.on_log(ARGS, SimpleNamespace(is_world_process_zero=False, global_step=50, max_steps=100), None, logs=line)
        other.on_log(ARGS, state, None, logs={"eval_nll": 6.4})
    assert other.said == []
