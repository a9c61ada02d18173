"""A teacher behind a URL: over real HTTP, from a real model, against the same model run live."""

from __future__ import annotations

import json

import pytest

from qtarget.core.errors import ConfigError, ScoringServerError
from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.report.runs.records import LOG_FILE
from qtarget.scoring.sources.http import Retries
from tests.integrations.conftest import make_model, make_tokenizer
from tests.integrations.rl.conftest import SETTINGS, gradient_norms, trained
from tests.integrations.rl.test_privileged import ragged
from tests.scoring.sources.servers import FakeVllm, serving


@pytest.fixture
def server():
    engine = FakeVllm(make_model(3).eval(), make_tokenizer())
    engine.max_logprobs = 200
    with serving(engine) as url:
        yield engine, url


OPD = {"target": "reverse_kl", "rewards": None, "max_steps": 3, "learning_rate": 5e-3, "steps_per_generation": 2}


@pytest.mark.parametrize(
    "privileged", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["plain", "privileged"]
)
def test_it_teaches_as_the_model_itself(privileged, ours, server):
    """All tokens listed: the runs are one run, up to rounding."""
    seen = {"privileged_column": "solution", "privileged_template": "{privileged}{prompt}"} if privileged else {}
    vocab = make_model().get_output_embeddings().weight.shape[0]
    settings = {**OPD, **seen, "data": ragged()}
    live = trained(ours(None, extra={"teacher_model": make_model(3)}, **settings))
    asked = trained(ours(None, teacher=server[1], teacher_top_k=vocab, **settings))
    assert asked.losses == pytest.approx(live.losses, rel=1e-4)
    assert gradient_norms(asked) == pytest.approx(gradient_norms(live), rel=1e-3)
    assert live.losses[0] > 1e-3


def test_few_tokens_and_one_for_the_rest_are_a_lower_bound(ours, server):
    settings = {**OPD, "max_steps": 1, "steps_per_generation": 1}
    live = trained(ours(None, extra={"teacher_model": make_model(3)}, **settings))
    asked = trained(ours(None, teacher=server[1], teacher_top_k=5, **settings))
    assert 0 < asked.losses[0] < live.losses[0]
    taught = {"advantage": "teacher", "rewards": None, "max_steps": 2}
    live = trained(ours("dppo_tv", extra={"teacher_model": make_model(3)}, **taught))
    asked = trained(ours("dppo_tv", teacher=server[1], **taught))  # one number a token is all that is read
    assert asked.losses == pytest.approx(live.losses, rel=1e-4)


def test_a_server_that_fails_ends_the_run_and_the_checkpoint_stays(ours, server, tmp_path, monkeypatch):
    monkeypatch.setattr(Retries, "wait", lambda *_: None)
    engine, url = server
    trainer = ours(None, teacher=url, save_strategy="steps", save_steps=1, **{**OPD, "steps_per_generation": 1})
    plain, calls = engine.log_probs, []

    def broken(ids):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("out of memory")
        return plain(ids)

    engine.log_probs = broken
    with pytest.raises(ScoringServerError):
        trainer.train()
    assert [path.name for path in (tmp_path / "ours").glob("checkpoint-*")] == ["checkpoint-1"]
    lines = [json.loads(line) for line in (tmp_path / "ours" / LOG_FILE).read_text().splitlines()]
    assert any("stopped" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.7}, "temperature: 0.7.*at temperature 1"),
        ({"teacher_model_name_or_path": "x"}, "both set"),
        ({"teacher_top_k": 0}, "teacher_top_k is 0, expected at least 1"),
    ],
)
def test_what_does_not_go_with_a_server(settings, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        QTargetGRPOConfig(str(tmp_path), teacher="http://127.0.0.1:1", target="reverse_kl", **{**SETTINGS, **settings})


def test_nobody_there(ours):
    with pytest.raises(ScoringServerError):
        ours(None, teacher="http://127.0.0.1:9", target="reverse_kl", rewards=None)
