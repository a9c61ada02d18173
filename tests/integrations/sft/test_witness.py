"""The cross-fit on its way to the loss: looked up by row, judged by source, padded and packed; what is told before step one."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

import qtarget
from qtarget import QTargetConfig
from qtarget.core.errors import CacheMismatchError, ConfigError, MissingStatisticError
from qtarget.data.crossfit.witness import verdict
from qtarget.integrations.sft.crossfit import CrossfitRecipe, crossfit_score
from qtarget.integrations.sft.data.witnesses import Sources
from qtarget.scoring.cache.reader import ReferenceCache
from qtarget.scoring.cache.schema import row_checksum
from tests.integrations.conftest import SETTINGS, make_model, make_tokenizer
from tests.integrations.sft.test_consensus import NOISY, formatted_rows, tokens_of


def sourced_rows() -> Dataset:
    """Formatted rows of ``web``, and four of ``books``, whose letters nobody can expect."""
    rows, letters = formatted_rows().to_list(), np.random.default_rng(1)
    for i, row in enumerate(rows):
        row["source"] = "books" if i >= 12 else "web"
        if i >= 12:
            row["completion"] = "".join(letters.choice([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], size=6))
    return Dataset.from_list(rows)


@pytest.fixture
def judged(tmp_path, cached):
    """Caches of the base and of the cross-fit of some rows."""

    def score(rows, **settings):
        reference = cached(make_model(), rows, **settings)
        base = tmp_path / "base"
        make_model().save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        args = QTargetConfig(str(tmp_path / "unused"), **{**SETTINGS, **settings})
        recipe = CrossfitRecipe(steps=30, learning_rate=3e-2, rank=8)
        crossfit_score(
            str(base), args, rows, None, make_tokenizer(), directory=tmp_path / "witness", recipe=recipe, progress=False
        )
        return {"reference_cache": reference, "witness": str(tmp_path / "witness")}

    return score


def by_hand(path: str, rows: Dataset) -> list[np.ndarray]:
    """Label log-probs of each row, by its checksum."""
    cache, (ids, masks) = ReferenceCache.open(path), tokens_of(rows)
    places = cache.locate([row_checksum(*row) for row in zip(ids, masks, strict=True)])
    return [cache.row(place)["label_log_probs"] for place in places]


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_from_caches_is_that_of_full_logits(make_trainer, judged, packing):
    rows = sourced_rows()
    paths = judged(rows)
    trainer = make_trainer("crossfit_consensus", data=rows, packing=packing, **paths)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
    base, copies, (ids, masks) = (
        by_hand(paths["reference_cache"], rows),
        by_hand(paths["witness"], rows),
        tokens_of(rows),
    )
    groups = {"web": range(12), "books": range(12, 16)}
    verdicts = {}
    for members in groups.values():
        numbers = [np.concatenate([found[i] for i in members]) for found in (base, copies)]
        found = verdict(*numbers, np.concatenate([np.full(len(base[i]), i) for i in members]))
        verdicts |= dict.fromkeys(members, found)
    assert verdicts[0].noise_tokens < verdicts[12].noise_tokens - 0.1, "the case is too weak to tell"
    total, count = 0.0, 0
    for index in {int(i) for i in batch["row_ids"].unique()} - {-1}:
        at = torch.tensor([i - 1 for i, kept in enumerate(masks[index]) if kept])
        row = torch.tensor(ids[index])
        with torch.no_grad():
            logits = make_model().eval()(row[None]).logits[0, at]
        told = {name: torch.full((len(at),), value) for name, value in vars(verdicts[index]).items()}
        known = qtarget.Reference(
            label_log_probs=torch.from_numpy(base[index]), log_probs=logits.log_softmax(-1),
            crossfit=torch.from_numpy(copies[index]).exp(), **told,
        )  # fmt: skip
        target = qtarget.get_target("crossfit_consensus")
        total += float(qtarget.target_loss(logits, row[at + 1], target, reference=known, reduction="sum"))
        count += len(at)
    assert loss == pytest.approx(total / count, rel=1e-3)


def test_padded_and_packed_train_alike_and_the_noise_weighs_least(make_trainer, judged):
    paths, runs = judged(formatted_rows()), []
    for settings in ({"per_device_train_batch_size": 16}, {"packing": True, "max_length": 256}):
        trainer = make_trainer("crossfit_consensus", data=formatted_rows(), max_steps=2, **paths, **settings)
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    plain = make_trainer("crossfit_consensus", data=formatted_rows(), **paths)
    at_last = {row["qtarget_row_ids"][0]: row["reference_crossfit"][-2] for row in plain.train_dataset}
    assert at_last[NOISY] < 0.1 < np.median([p for row, p in at_last.items() if row != NOISY])


def test_the_log_tells_each_source_and_the_rows_that_hardly_teach(make_trainer, judged, caplog):
    paths = judged(sourced_rows())
    with caplog.at_level(logging.WARNING):
        rows = sourced_rows()
        make_trainer("crossfit_consensus", data=rows, evals=rows, target_kwargs={"caution": 100}, **paths)
    told = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("train data, by copies that have not seen the rows, books: ") for line in told) == 1
    assert sum(line.startswith("train data, by copies that have not seen the rows, web: ") for line in told) == 1
    (silent,) = [line for line in told if line.startswith("train data, books: ")]
    assert "of 4 rows" in silent and "mean weight under 0.05" in silent
    assert any(repr(row["completion"] + "^") in silent for row in sourced_rows().select(range(12, 16)))
    assert any(f"row {number}, " in silent for number in range(13, 17))
    assert not any(line.startswith(("train data, web: ", "eval data, books: ")) for line in told)


def test_reliability_is_told_of_each_source_without_a_cross_fit_too(make_trainer, cached, caplog):
    path = cached(make_model(seed=3), sourced_rows(), model_id="base")
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            "consensus", data=sourced_rows(), evals=sourced_rows(), reference_cache=path,
            reference_model_name_or_path="base",
        )  # fmt: skip
    told = [record.getMessage() for record in caplog.records]
    lines = [line for line in told if line.startswith("reference: reliability of the frozen model")]
    assert [line.split(", ")[2].split(":")[0] for line in lines] == ["books", "web"]
    rho = {row["qtarget_row_ids"][0]: max(row["reference_reliability"]) for row in trainer.train_dataset}
    assert len({round(rho[i], 5) for i in (0, 1, 13)}) >= 2  # each source has its own
    own = sourced_rows().rename_column("source", "origin")
    named = make_trainer(
        "consensus", data=own, group_by="origin", reference_cache=path, reference_model_name_or_path="base"
    )
    assert {row["qtarget_row_ids"][0]: max(row["reference_reliability"]) for row in named.train_dataset} == rho
    with pytest.raises(ConfigError, match="no such column"):
        make_trainer(
            "consensus", data=own, group_by="colour", reference_cache=path, reference_model_name_or_path="base"
        )


def test_a_language_is_a_source_too():
    pytest.importorskip("py3langid")
    texts = ["The answer is [3], as everybody can see.", "Die Antwort lautet also [3].", "I do not know what you mean."]
    found = Sources.of(Dataset.from_list([{"prompt": "?", "completion": text} for text in texts]), "language")
    assert found.groups(np.array([2, 1, 0]))[0] == ["de", "en"]
    assert found.groups(np.array([2, 1, 0]))[1].tolist() == [1, 0, 1]


def test_what_is_missing_or_does_not_fit_is_refused_with_the_way_out(make_trainer, judged, tmp_path, cached):
    rows = formatted_rows()
    paths = judged(rows)
    with pytest.raises(MissingStatisticError, match=r"crossfit.*--crossfit 2.*witness"):
        make_trainer("crossfit_consensus", data=rows, reference_cache=paths["reference_cache"])
    with pytest.raises(CacheMismatchError, match="is an ordinary cache, whose model may have seen the rows"):
        make_trainer("crossfit_consensus", data=rows, **{**paths, "witness": paths["reference_cache"]})
    other = Dataset.from_list([*rows.to_list(), {"prompt": "new:", "completion": "is n ok"}])
    with pytest.raises(CacheMismatchError, match="are not in the cache"):
        make_trainer(
            "crossfit_consensus", data=other, reference_cache=paths["reference_cache"], witness=paths["witness"]
        )
    (tmp_path / "cache").rename(tmp_path / "of the base")
    path = cached(make_model(seed=5), rows, model_id="another")
    named = {"reference_cache": path, "reference_model_name_or_path": "another"}
    with pytest.raises(CacheMismatchError, match="expected one base"):
        make_trainer("crossfit_consensus", data=rows, witness=paths["witness"], **named)
    make_trainer("sft", data=rows, witness=str(tmp_path / "yet to be"))  # waits for a target that asks it


def test_an_unfinished_witness_leads_nobody(make_trainer, judged, tmp_path):
    paths = judged(formatted_rows())
    (tmp_path / "witness/.copies").mkdir()
    for target, options in (("crossfit_consensus", {}), ("sft", {"filter": "crossfit"})):
        with pytest.raises(CacheMismatchError, match="is not finished"):
            make_trainer(target, data=formatted_rows(), **paths, **options)


def test_copies_worse_than_the_base_lead_no_target_and_ignorant_ones_are_told(
    make_trainer, judged, monkeypatch, caplog
):
    from qtarget.filtering.copies import Knowledge
    from qtarget.integrations.sft.data import witnesses

    paths = judged(formatted_rows())
    trainer = make_trainer("crossfit_consensus", data=formatted_rows(), **paths)
    known = witnesses.judge_copies(*(ReferenceCache.open(paths[key]) for key in ("witness", "reference_cache")))
    assert known.known
    assert known.copies == pytest.approx(
        np.median([-row.mean() for row in by_hand(paths["witness"], formatted_rows())])
    )
    assert not any("copies" in line for line in trainer.preparation.audits["train"])
    monkeypatch.setattr(witnesses, "judge_copies", lambda *_: Knowledge(16, 9.0, 8.0, 5.0))
    with pytest.raises(MissingStatisticError, match="know less than the base"):
        make_trainer("crossfit_consensus", data=formatted_rows(), **paths)
    monkeypatch.setattr(witnesses, "judge_copies", lambda *_: Knowledge(16, 4.0, 3.0, 5.0))
    caplog.clear()
    trainer = make_trainer("crossfit_consensus", data=formatted_rows(), **paths)
    (said,) = [line for line in trainer.preparation.audits["train"] if "the copies do not know these rows" in line]
    assert "qtarget score" in said
    assert "--output" in said
    assert "% of tokens" not in caplog.text
    assert "how much is noise, nobody can tell" in caplog.text
