"""``QTargetTrainer`` with ``target="sft"`` is TRL's ``SFTTrainer``: every act of the table, done with both."""

import inspect
import re

import pytest
from trl.trainer.sft_trainer import SFTTrainer

from qtarget import QTargetTrainer
from tests import ROOT
from tests.peers.acts import ACTS, BOTH_REFUSE, WORKS, outcome

START, END = "<!-- table: scripts/update_trainer_docs.py -->", "<!-- end of table -->"


def committed() -> dict[str, str]:
    """The table in docs/trainer.md."""
    text = (ROOT / "docs/trainer.md").read_text()
    lines = text[text.index(START) : text.index(END)].splitlines()[3:]
    return dict(line.strip("| ").split(" | ", 1) for line in lines)


LONG = re.compile(r"(GPT-OSS|Qwen3-MoE)(, router_aux_loss_coef .*)?$")
"""Acts that a quick suite has once, with Mixtral."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if LONG.match(name) else name for name in ACTS]
)
def test_as_the_table_says(name):
    assert outcome(name) == committed()[name]


def test_the_table_is_whole():
    assert list(committed()) == list(ACTS)
    refused = {name for name, found in committed().items() if found != WORKS and not found.startswith(BOTH_REFUSE)}
    assert refused == {
        "label_smoothing_factor",
        "compute_loss_func",
        "data_collator",
        "dataset_kwargs skip_prepare_dataset",
        "evaluation rows packed, training rows not",  # TRL's collator pads them, and documents see one another
        "GPT-OSS, padding-free",  # transformers 5.23: its masks know no position_ids, and documents see one another
    }


def test_the_signature_is_trls():
    ours, theirs = (list(inspect.signature(cls.__init__).parameters.values()) for cls in (QTargetTrainer, SFTTrainer))
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    assert [p.default for p in ours[1 : len(theirs)]] == [p.default for p in theirs[1:]]
    own = ours[len(theirs) :]
    assert [p.name for p in own] == ["reference_model", "teacher_model"]
    assert {p.kind for p in own} == {inspect.Parameter.KEYWORD_ONLY}
