"""Evidence of copies in `bench noise`, what drops rows of a batch, the newer kinds and tasks, and equal compute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qtarget.benchmarks.finetune import Encoded, Recipe, completion_log_probs, encode, fine_tune, of_labels
from qtarget.benchmarks.noise.crossfitting import crossfit_of, forward_steps, masks_of, with_crossfit
from qtarget.benchmarks.noise.methods import METHODS
from qtarget.benchmarks.noise.runs import Cell, Material, chosen_rows, known_of, noisy_rows, parse_cell
from qtarget.benchmarks.noise.selection import Peer, Tail, row_losses
from qtarget.benchmarks.start import Start
from qtarget.benchmarks.tasks import cogs_tasks, embedded_tasks, listops_tasks
from qtarget.core.errors import ConfigError
from qtarget.core.types import Reference
from qtarget.data.embedded import base_model_path
from qtarget.data.tasks import check
from qtarget.filtering import ScoredRows
from qtarget.registry import get_target
from tests import SHARED

RECIPE = Recipe(1e-3, 8, 3, 0)


@pytest.fixture(scope="module")
def material() -> Material:
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    rows = noisy_rows(embedded_tasks(train_rows=48).train, Cell("none", "wrong_answer", 0.5), 0, tokenizer)
    encoded = encode(tokenizer, rows)
    return Material(encoded, known_of(Start().load(), encoded))


def test_copies_judge_each_row_and_the_filter_takes_it(material):
    told = crossfit_of(material.rows, Start().load, RECIPE)
    known, evidence = with_crossfit(material.rows, material.known, told, Start().load)
    assert evidence.crossfit is not None
    assert evidence.contradiction is not None
    torch.testing.assert_close(torch.cat([one.crossfit for one in known]).log(), torch.cat(told.log_probs))  # pyright: ignore[reportArgumentType, reportCallIssue]
    np.testing.assert_allclose(evidence.crossfit, torch.cat(told.log_probs).numpy(), rtol=1e-5)
    assert [sum(mask) for mask in masks_of(material.rows)] == [len(values) for values in told.log_probs]
    judged = replace(material, known=known, evidence=evidence)
    kept, _ = chosen_rows(METHODS["sft, share by witness"], 0.5, judged)
    assert len(kept) == 24
    everything, _ = chosen_rows(METHODS["sft, rows by witness"], 0.0, judged)
    assert len(everything) == 48  # too few rows for a verdict
    clean, _ = chosen_rows(METHODS["sft, marked rows left out"], 0.0, judged)
    assert len(clean) == 24
    assert not any(any(row.noise) for row in clean)


def test_the_tail_is_what_was_learnt_most(material):
    model, rows = Start().load(), material.rows[:16]
    tail = Tail(rows, material.known[:16], 0.25)
    assert tail(model, [1, 2, 3, 4], 0) == [1, 2, 3]  # nothing has fallen: ties go by place
    fine_tune(model, rows[:4], get_target("sft"), Recipe(1e-3, 4, 6, 0))
    fallen = np.array([-float(one.label_log_probs.mean()) for one in material.known[:8]]) - row_losses(model, rows[:8])  # pyright: ignore[reportOptionalMemberAccess]
    assert set(tail(model, list(range(8)), 1)) == set(range(8)) - set(np.argsort(fallen)[-2:].tolist())


def test_peers_teach_each_other_their_small_losses(material):
    rows, model = material.rows[:16], Start().load()
    peer = Peer(rows, Start().load(), 0.5, Recipe(1e-3, 8, 6, 0))
    before = {name: value.clone() for name, value in peer.peer.state_dict().items()}
    assert peer(model, list(range(8)), 0) == list(range(8))  # the share grows from 0
    assert any(not torch.equal(value, before[name]) for name, value in peer.peer.state_dict().items())
    losses = row_losses(peer.peer, rows[:8])
    assert set(peer(model, list(range(8)), 3)) == set(np.argsort(losses)[:4].tolist())


def test_only_the_selected_rows_are_trained_on(material):
    asked: list[int] = []

    def first(model: object, chosen: list[int], step: int) -> list[int]:
        asked.append(step)
        return [0]

    selected, plain = Start().load(), Start().load()
    fine_tune(selected, material.rows[:8], get_target("sft"), RECIPE, select=first)
    fine_tune(plain, [material.rows[0]], get_target("sft"), RECIPE)
    assert asked == [0, 1, 2]
    torch.testing.assert_close(selected.lm_head.weight, plain.lm_head.weight)


def test_a_minority_is_right_and_nothing_of_it_is_marked():
    rows = noisy_rows(embedded_tasks(train_rows=40).train, Cell("most", "minority", 0.1), 0, None)
    german = [row for row in rows if row["prompt"].startswith("Auf Deutsch. ")]
    assert len(german) == 4
    assert all(check(row, row["completion"]) and not row["noise_spans"] for row in german)


def test_what_copies_cost_in_steps():
    # two copies of 40 steps; base and copy on 640 rows, and six other prompts each: 8 x 40 batches at a third of a step
    assert forward_steps(640, 40, 16) == 2 * 40 + 107


def test_a_cell_by_name_and_what_is_none():
    assert parse_cell("most:truncation:0.2") == Cell("most", "truncation", 0.2)
    for wrong in ("most", "all:truncation:0.2", "most:rain:0.2", "most:truncation:2"):
        with pytest.raises(ConfigError, match="BASE:KIND:RATE"):
            parse_cell(wrong)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data are not here")
@pytest.mark.parametrize("make", [cogs_tasks, listops_tasks])
def test_fresh_tasks_are_checkable_and_apart(make):
    task = make(SHARED, train_rows=100)
    assert len(task.train) == 100
    assert all(check(row, row["completion"]) for row in task.train + task.test)
    trained = {row["prompt"] for row in task.train + task.validation + task.warmup}
    assert not trained & {row["prompt"] for row in task.test}


def test_listops_as_written_reduces_to_its_answer():
    if not SHARED.is_dir():
        pytest.skip("the real data are not here")
    operations = {"N": min, "X": max, "F": lambda v: v[0], "L": lambda v: v[-1], "S": lambda v: sum(v) % 10,
                  "D": lambda v: int(np.median(v))}  # fmt: skip

    def value(tokens: list[str]) -> int:
        token = tokens.pop(0)
        if token.isdigit():
            return int(token)
        found = []
        while tokens and tokens[0] != ")":
            if tokens[0] == "(":
                tokens.pop(0)
            found.append(value(tokens))
        if tokens:
            tokens.pop(0)
        return operations[token](found)

    for row in listops_tasks(SHARED, train_rows=100).train:
        question = row["prompt"].split("Reduce ")[1].split(".\n")[0]
        assert str(value(question.replace("(", "( ").replace(")", " )").split())) == row["answer"]


def test_a_row_alone_has_nobody_to_be_contradicted_by():
    from qtarget.data.crossfit.neighbours import contradiction, nearest_prompts

    assert (nearest_prompts([np.array([1, 2])] * 3) == -1).all()
    assert contradiction(np.array([-3.0]), np.full((1, 6), -np.inf)).tolist() == [-20.0]


def test_the_nearest_prompts_are_those_of_the_plain_loop():
    from qtarget.data.crossfit.neighbours import PROMPTS, nearest_prompts

    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 30, rng.integers(3, 12)) for _ in range(60)]
    sets = [set(row.tolist()) for row in prompts]
    found = nearest_prompts(prompts)
    for i, mine in enumerate(sets):
        alike = np.array([
            -1.0 if prompts[i].tolist() == prompts[j].tolist() else len(mine & other) / np.sqrt(len(mine) * len(other))
            for j, other in enumerate(sets)
        ])  # fmt: skip
        np.testing.assert_allclose(alike[found[i]], np.sort(alike)[::-1][:PROMPTS], rtol=1e-6)


def test_rows_are_weighed_by_what_the_filter_believes_of_them_and_all_stay_where_it_cannot_tell():
    rng, masks = np.random.default_rng(0), [np.array([False] + [True] * 6)] * 200
    ids = [rng.integers(0, 50, 7) for _ in masks]
    entropy = [rng.exponential(0.4, 6) for _ in masks]
    log_probs = [-rng.exponential(expected) for expected in entropy]
    rows, known = [Encoded([1], [2], [False]) for _ in masks], [Reference() for _ in masks]

    def weights(said: list[np.ndarray]) -> np.ndarray:
        evidence = ScoredRows.of(ids, masks, said, entropy, crossfit=said, crossfit_entropy=entropy)
        chosen, numbers = chosen_rows(METHODS["sft, rows weighed by witness"], 0.0, Material(rows, known, evidence))
        assert len(chosen) == len(numbers) == 200
        return np.array([row.weight for row in chosen])

    assert (weights(log_probs) == 1).all()
    bad = [values - np.array([8.0, 8, 0, 0, 0, 0]) * (row % 5 == 0) for row, values in enumerate(log_probs)]
    found = weights(bad)
    assert 0 < found[::5].max() < 0.05 and np.delete(found, np.arange(0, 200, 5)).min() > 0.5


def test_a_weight_multiplies_all_that_a_row_teaches(material):
    """The first loss is the sum of weight x loss over the number of tokens, of the label and of the anchor."""
    chosen = [replace(row, weight=weight) for row, weight in zip(material.rows[:2], (0.25, 1.0), strict=True)]
    known = [replace(one, log_probs=torch.zeros_like(one.log_probs) - np.log(512)) for one in material.known[:2]]  # pyright: ignore[reportArgumentType]
    for name, anchor in (("sft", 0.0), ("sft_kl", 1.0)):
        target = get_target(name, **({"kl_weight": 1.0} if anchor else {}))
        first = fine_tune(Start().load(), chosen, target, Recipe(1e-3, 2, 1, 0), reference=known if anchor else None)
        sums = 0.0
        for row, base in zip(chosen, completion_log_probs(Start().load(), chosen), strict=True):
            uniform = -np.log(512) - base.mean(-1)  # KL(uniform || p)
            sums += row.weight * float((-of_labels(base, row) + anchor * uniform).sum())
        assert first.losses[0] == pytest.approx(sums / sum(len(row.completion) for row in chosen), rel=1e-4)


def test_encoded_rows_know_their_masks():
    assert masks_of([Encoded([1, 2], [3], [False])]) == [[False, False, True]]
