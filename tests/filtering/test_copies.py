"""Do copies know rows that they have not seen? From arrays, and what is advised where they do not."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qtarget.command import command_for, remember
from qtarget.core.errors import CacheMismatchError, MissingStatisticError
from qtarget.data.crossfit.steps import FEWEST_STEPS, MOST_PASSES, default_steps, stated_steps, steps_of
from qtarget.filtering.copies import Knowledge, judge_copies, knowledge_of, next_step, refuse_behind


def drawn(rows: int, believed: float, temperature: float, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probs and entropies of a model that gives tokens of two kinds ``believed`` : 1, whose rows are drawn at a temperature."""
    rng = np.random.default_rng(seed)
    p = np.array([believed, 1.0]) / (believed + 1)
    entropy = float(-(p * np.log(p)).sum())
    true = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    picks = rng.choice(2, (rows, 20), p=true)
    return [np.log(p)[row] for row in picks], [np.full(20, entropy)] * rows


def test_who_is_as_surprised_as_expected_knows_the_rows_and_who_is_sure_of_something_else_does_not() -> None:
    said, entropy = drawn(101, 9.0, 1.0)
    found = knowledge_of(said, entropy, [row - 1 for row in said])
    assert found.known
    assert found.unexpected == pytest.approx(0, abs=0.1)
    assert found.base == pytest.approx(found.copies + 1)
    sure = [np.full(20, np.log(0.001))] * 101  # of tokens that never come
    assert not knowledge_of(sure, [np.full(20, 0.01)] * 101, None).known


def test_who_spreads_over_a_whole_vocabulary_expects_surprise_and_knows_nothing() -> None:
    uniform = [np.full(20, -np.log(50_000))] * 60
    found = knowledge_of(uniform, [-row for row in uniform], None)
    assert found.unexpected == 0
    assert not found.known
    assert "no likelier to them than noise, 4.6 nats a token" in found.sentence


def test_noise_in_fewer_than_half_of_the_rows_is_no_ignorance() -> None:
    said, entropy = drawn(100, 9.0, 1.0)
    for row in range(40):
        said[row] = np.full(20, -12.0)
    assert knowledge_of(said, entropy, None).known
    for row in range(60):
        said[row] = np.full(20, -12.0)
    assert not knowledge_of(said, entropy, None).known


def test_rows_without_trained_tokens_and_excluded_labels_do_not_break_it() -> None:
    said = [np.zeros(0), np.full(3, -np.inf)]
    found = knowledge_of(said, [np.zeros(0), np.zeros(3)], said)
    assert (found.rows, found.copies, found.unexpected, found.base) == (1, 30.0, 30.0, 30.0)
    assert found.behind


def told(path: Path, steps: int = 23, passes_over: int = 90) -> Any:
    recipe = {**stated_steps(steps), "learning_rate": 5e-4, "rank": 8, "batch_size": 8}
    crossfit = {"folds": 2, "rows": [passes_over, passes_over], "recipe": recipe}
    return SimpleNamespace(path=path, manifest=SimpleNamespace(crossfit=crossfit))


def test_the_advice_is_a_command_with_every_option(tmp_path) -> None:
    remember("a run.yaml", ["--seed", "3", "--target", "dft", "--witness", "w"])
    ignorant = Knowledge(90, copies=8.0, unexpected=6.0, base=9.0)
    assert not ignorant.known
    assert not ignorant.behind
    what, command, _, after, _ = next_step(ignorant, told(tmp_path / "w")).split("`")
    words = shlex.split(command)
    assert what == "train them longer: "
    assert words[:5] == ["qtarget", "score", "a run.yaml", "--seed", "3"]
    assert "--target" not in words
    options = dict(zip(words[5::2], words[6::2], strict=True))
    folder = str(tmp_path / "w-150-steps-0.001")
    assert options == {
        "--crossfit": "2", "--crossfit-steps": "150", "--crossfit-rate": "0.001", "--crossfit-rank": "8", "--output": folder,
    }  # fmt: skip
    assert after == f"--witness {folder}"
    again = next_step(ignorant, told(tmp_path / "w-150-steps-0.001", steps=150))
    assert str(tmp_path / "w-600-steps-0.001") in again  # and no name that grows


def test_copies_that_more_steps_would_make_worse_are_told_to_learn_slower(tmp_path) -> None:
    diverged = Knowledge(90, copies=10.0, unexpected=8.0, base=9.0)
    assert diverged.behind
    assert "know less than the base" in diverged.sentence
    assert "at a lower rate: " in (long := next_step(diverged, told(tmp_path / "w", steps=150)))
    assert "--crossfit-steps 150 --crossfit-rate 0.000125" in long
    assert "--crossfit-steps 150 --crossfit-rate 0.000125" in next_step(diverged, told(tmp_path / "w", steps=5))
    by_heart = Knowledge(90, copies=4.0, unexpected=3.0, base=9.0)
    assert "--crossfit-steps 2000 " in next_step(by_heart, told(tmp_path / "w", steps=2000))
    with pytest.raises(MissingStatisticError, match=r"target x: witness .*know less than the base.*--output"):
        refuse_behind(diverged, told(tmp_path / "w"), "target x")
    refuse_behind(by_heart, told(tmp_path / "w"), "target x")


@pytest.mark.parametrize("off", [0.0, 1e-4, 0.09])
def test_copies_that_too_few_steps_left_where_the_base_was_are_told_to_learn_longer(tmp_path, off) -> None:
    """The advice is followed until it ends: each time more steps, and never a rate that vanishes."""
    unmoved = Knowledge(90, copies=9.2 + off, unexpected=6.3, base=9.2)
    assert unmoved.behind
    assert "know no more than the base" in unmoved.sentence
    path, steps = tmp_path / "w", 5
    for expected in (150, 600):
        said = next_step(unmoved, told(path, steps=steps))
        assert said.startswith("train them longer: ")
        assert f"--crossfit-steps {expected} --crossfit-rate 0.001 " in said
        steps = expected


def cache_of(path: Path, names: list[str]) -> Any:
    """What is asked of a cache, of rows of one token each."""
    return SimpleNamespace(
        path=path, manifest=SimpleNamespace(columns=("label_log_probs",)), checksums=lambda: names,
        find=lambda asked: [names.index(name) if name in names else -1 for name in asked],
        locate=lambda asked: [names.index(name) for name in asked],
        row=lambda place: {"label_log_probs": np.full(1, -0.1)},
    )  # fmt: skip


def test_caches_without_a_row_in_common_tell_nothing(tmp_path) -> None:
    remember("run.yaml")
    copies, base = cache_of(tmp_path / "w", ["a", "b"]), cache_of(tmp_path / "c", ["b", "c"])
    assert judge_copies(copies, base).rows == 1
    other = cache_of(tmp_path / "c", ["c"])
    with pytest.raises(CacheMismatchError, match=r"/w has no rows that .*/c has, too.*`qtarget score run.yaml`"):
        judge_copies(copies, other)
    with pytest.raises(CacheMismatchError, match=r"/w has no rows, so"):
        judge_copies(cache_of(tmp_path / "w", []))


@pytest.mark.parametrize("rows", [1, 6, 45, 59, 61, 150, 599, 601, 100_000])
def test_few_rows_are_seen_often_and_never_too_often(rows) -> None:
    steps = default_steps(rows, 8)
    passes = steps * 8 / rows
    assert steps >= 2 * rows / 8
    assert steps >= FEWEST_STEPS or passes >= MOST_PASSES
    assert (steps - 1) * 8 / rows < MOST_PASSES
    assert steps_of({"rows": [rows, rows], "recipe": {"batch_size": 8} | stated_steps(None)})[0] == steps


def test_a_cache_of_an_earlier_version_tells_its_steps() -> None:
    assert steps_of({"rows": [90, 90], "recipe": {"steps": None, "passes": 2, "batch_size": 8}}) == (23, 184 / 90)


def test_values_with_spaces_are_quoted() -> None:
    remember("run.yaml", ["--train_file=my rows.jsonl"])
    assert (
        command_for("score", "--output", "a b") == "qtarget score run.yaml '--train_file=my rows.jsonl' --output 'a b'"
    )
