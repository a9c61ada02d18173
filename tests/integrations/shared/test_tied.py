"""A tied head is never missing from a checkpoint: the embeddings bring it along."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.nn.modules.module import _IncompatibleKeys
from transformers import Trainer

from qtarget.integrations.rl.trainer import QTargetGRPOTrainer
from qtarget.integrations.sft.trainer import QTargetTrainer

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("kind", [QTargetTrainer, QTargetGRPOTrainer])
@pytest.mark.parametrize(
    ("missing", "told"), [([HEAD], []), ([HEAD, "a"], ["a"]), ([HEAD, EMBEDDINGS], [HEAD, EMBEDDINGS]), ([], [])]
)
def test_only_what_nothing_brings_along_is_missing(monkeypatch, kind, missing, told):
    said = []
    monkeypatch.setattr(Trainer, "_issue_warnings_after_load", lambda self, result: said.append(result.missing_keys))
    trainer = object.__new__(kind)
    trainer.model = SimpleNamespace(all_tied_weights_keys={HEAD: EMBEDDINGS})
    trainer._issue_warnings_after_load(_IncompatibleKeys(missing, []))
    assert said == [told]
