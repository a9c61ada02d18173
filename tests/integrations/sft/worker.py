"""A training run in a process of its own, to be killed, resumed, or run twice side by side.

None,
make_rows() if options.rows == "plain" else tokenised(options.rows == "masked"),
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

import torch
from transformers import TrainerCallback

from qtarget import QTargetConfig, QTargetTrainer
from qtarget.integrations.shared.checkpoints import last_complete_checkpoint
from tests.integrations.conftest import SETTINGS, make_model, make_rows, make_tokenizer
from tests.integrations.sft.data.test_weights import tokenised


class DieAt(TrainerCallback):
    """SIGKILL, with no chance to clean up, once a step is done (and saved, if it is a step that saves)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--rows", choices=["plain", "weighted", "masked"], default="plain")
    parser.add_argument(
        "--model", help="load the model from here, after the settings: under ZeRO-3 it is split at once"
    )
    parser.add_argument("--evaluate", type=int, help="evaluate this many rows at the end, after a prediction")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = make_model(seed=3)
    arguments = QTargetConfig(options.output, **{**SETTINGS, **options.settings})
    trainer = QTargetTrainer(
        options.model or make_model(tie_word_embeddings=options.tied),
        arguments,
        None,
        make_rows() if options.rows == "plain" else tokenised(options.rows == "masked"),
        make_rows(options.evaluate, seed=9) if options.evaluate else None,
        make_tokenizer(),
        reference_model=base,
        callbacks=[] if options.die_at is None else [DieAt(options.die_at)],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(options.output) if options.resume else None)
    if options.evaluate:
        trainer.predict(trainer.train_dataset)
        trainer.evaluate()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered, which takes every rank
    if trainer.accelerator.is_main_process:
        torch.save(dict(state), f"{options.output}/final.pt")
        with open(f"{options.output}/log.json", "w") as file:
            json.dump(trainer.state.log_history, file)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # all is written; gloo's threads abort a process that winds down while the other one still talks


if __name__ == "__main__":
    main()
