"""Tools and environments are TRL's: the same calls, the same tokens left out, the same losses; and the samples say who spoke."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qtarget.integrations.rl.config import QTargetGRPOConfig
from qtarget.integrations.rl.trainer import QTargetGRPOTrainer
from qtarget.report.runs.records import ROLLOUTS_FILE
from tests.integrations.conftest import make_model
from tests.integrations.rl.conftest import SETTINGS, Recorded, gradient_norms

TEMPLATE = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
SPECIAL = ("<|im_end|>", "<|im_start|>")
ROWS = [{"prompt": [{"role": "user", "content": f"{a}+{a}"}], "answer": str(2 * a)} for a in range(1, 5)] * 2


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and Qwen3's chat template, whose tool calls TRL can read."""
    characters = ["~", "?", *sorted(set(string.printable) - {"~", "?"})]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="~", eos_token="<|im_end|>", unk_token="?", chat_template=TEMPLATE
    )


def add(a: int, b: int) -> int:
    """Adds.

    Args:
        a: one number
        b: another number

    Returns:
        the sum
    """
    return a + b


class Counter:
    """An environment: what was counted up to is its reward."""

    def reset(self, **_: Any) -> str:
        """Begin anew."""
        self.total = 0
        return "count"

    def count(self, by: int) -> str:
        """Count on.

        Args:
            by: how far

        Returns:
            the total
        """
        self.total += by
        return str(self.total)


def right(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    return [float(said[-1]["content"].strip() == a) for said, a in zip(completions, answer, strict=True)]


def counted(completions: Any, environments: list[Counter], **_: Any) -> list[float]:
    return [float(one.total) for one in environments]


class Scripted(Recorded):
    """The policy asks the tool once, then says what it heard; every fourth sample asks for a tool that is not there."""

    call = '<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call><|im_end|>'
    tool, arguments = "add", '{"a": 1, "b": 1}'

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        encode = lambda text: self.processing_class.encode(text, add_special_tokens=False)  # noqa: E731
        said = []
        for i, ids in enumerate(prompt_ids):
            heard = self.processing_class.decode(ids).partition("<tool_response>\n")[2].partition("\n<")[0]
            name = self.tool if i % 4 else "absent"
            said.append(
                encode(f"{heard}<|im_end|>" if heard else self.call.format(name=name, arguments=self.arguments))
            )
        return said, None


def run(kind: type, config: Any, reward: Any, **extra: Any) -> Any:
    made = type(f"Scripted{kind.__name__}", (Scripted, kind), extra.pop("script", {}))
    model = make_model(vocab_size=len(tokenizer()), max_position_embeddings=2048)
    trainer = made(model, reward, config, Dataset.from_list(ROWS), processing_class=tokenizer(), **extra)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("reward", "extra"),
    [
        (right, {"tools": [add]}),
        (counted, {"environment_factory": Counter, "script": {"tool": "count", "arguments": '{"by": 2}'}}),
    ],
    ids=["tools", "environment"],
)
def test_tools_and_environments_are_trls(tmp_path, reward, extra):
    settings = SETTINGS | {"max_completion_length": 256, "max_steps": 2}
    mine = run(
        QTargetGRPOTrainer,
        QTargetGRPOConfig(str(tmp_path / "a"), trust_region="policy_gradient", **settings),
        reward,
        **extra,
    )
    theirs = run(
        trl.GRPOTrainer,
        trl.GRPOConfig(str(tmp_path / "b"), scale_rewards="none", beta=0.0, **settings),
        reward,
        **extra,
    )
    assert mine.losses == pytest.approx(theirs.losses, abs=1e-6) and len(mine.losses) == 2
    assert gradient_norms(mine) == pytest.approx(gradient_norms(theirs), rel=1e-5) and min(gradient_norms(mine)) > 0
    lines, others = ([line for line in t.state.log_history if "reward" in line] for t in (mine, theirs))
    for line, other in zip(lines, others, strict=True):
        names = [name for name in other if name.startswith(("reward", "tools/"))]
        assert {name: line[name] for name in names} == pytest.approx({name: other[name] for name in names})
        assert line["tools/failure_frequency"] == pytest.approx(0.25)
    sample = json.loads((tmp_path / "a" / ROLLOUTS_FILE).read_text().splitlines()[1])
    spoken = "".join(t for t, p in zip(sample["tokens"], sample["log_probs"], strict=True) if p is not None)
    assert "<tool_response>" in sample["completion"] and "<tool_call>" in spoken and "<tool_response>" not in spoken
    torch.testing.assert_close(dict(mine.model.named_parameters()), dict(theirs.model.named_parameters()))
