"""One run of a student: trained by the public trainer, asked about held-out rows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qtarget.benchmarks.distill.runs import chosen_rows
from qtarget.benchmarks.finetune import Encoded, collate, hidden_states
from qtarget.benchmarks.real.distill.config import (
    CONTENDERS,
    TEACHER,
    UNTRAINED,
    PointJob,
    RealDistillConfig,
    cache_name,
)
from qtarget.benchmarks.real.distill.prepared import arguments
from qtarget.benchmarks.real.instructions import instruction_following
from qtarget.core.shapes import Float, Tensor

AT_ONCE = 8
"""Rows of a forward pass."""


class RealDistillWorker:
    """Runs jobs; keeps held-out rows and what the teacher says of them.

    Args:
        rows: by text and split.
        instructions: of ``instruction_rows``.
        folder: of students and caches.
    """

    def __init__(
        self,
        config: RealDistillConfig,
        rows: Mapping[str, Mapping[str, list[Any]]],
        instructions: Sequence[Mapping[str, Any]],
        folder: Path,
    ) -> None:
        self.config, self.rows, self.instructions, self.folder = config, rows, instructions, folder
        self.held_out = lru_cache(maxsize=None)(self._held_out)

    def __call__(self, job: PointJob) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        model = self.model(job).eval()
        found: dict[str, Any] = measured(model, *self.held_out(job.text, "validation" if job.tuning else "test"))
        if not job.tuning and self.config.follows(job.text):
            tokenizer, longest = self.config.start.tokenizer(), self.config.answer_tokens
            found["instructions"] = instruction_following(model, tokenizer, self.instructions, longest)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        return {**found, **{name: round(value, 1) for name, value in spent.items()}}

    def model(self, job: PointJob) -> Any:
        """The teacher, the student before training, or after it."""
        if job.method in (UNTRAINED, TEACHER):
            return self.config.start.load(None if job.method == TEACHER else self.folder / job.student)
        return self.trained(job)

    def trained(self, job: PointJob) -> Any:
        """The student after a run through the public trainer."""
        from datasets import Dataset

        from qtarget.integrations.sft.score import untold
        from qtarget.integrations.sft.trainer import QTargetTrainer

        plan, rows = CONTENDERS[job.method], self.rows[job.text]["train"]
        chosen = [rows[i] for i in chosen_rows(len(rows), job.fraction, job.seed)]
        cache = str(self.folder / job.text / cache_name(plan)) if plan.cache else None
        with TemporaryDirectory() as scratch, untold(True):  # that rows are cut is part of the setting
            args = arguments(
                self.config, Path(scratch), target=plan.target, target_kwargs=dict(plan.hyperparameters) or None,
                teacher_cache=cache, learning_rate=job.learning_rate, seed=job.seed,
            )  # fmt: skip
            student = str(self.folder / job.student)
            trainer = QTargetTrainer(student, args, None, Dataset.from_list(chosen))
            trainer.train()
        return trainer.model

    def _held_out(self, text: str, split: str) -> tuple[list[Encoded], list[Tensor], Tensor]:
        """Rows, the teacher's hidden states at their trained tokens, and its head."""
        found = json.loads((self.folder / text / "held_out.json").read_text(encoding="utf-8"))[split]
        rows = [encoded(*row) for row in found]
        teacher = self.config.start.load().eval()
        return rows, completion_states(teacher, rows), teacher.lm_head.weight.detach().clone()


def encoded(ids: list[int], labels: list[int]) -> Encoded:
    """A row whose trained tokens stand at its end; nothing predicts the first token of a text.

    Example:
        >>> encoded([5, 6, 7], [-100, -100, 7]).completion, encoded([5, 6, 7], [5, 6, 7]).completion
        ([7], [6, 7])
    """
    masked = max(1, sum(label == -100 for label in labels))
    return Encoded(ids[:masked], ids[masked:], [False] * (len(ids) - masked))


@torch.no_grad()
def completion_states(model: Any, rows: Sequence[Encoded]) -> list[Float[Tensor, "completion width"]]:
    """Last hidden states that predict each completion token, row by row."""
    out: list[Tensor] = []
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        ids, labels = (tensor.to(model.device) for tensor in collate(part))
        out += hidden_states(model, ids)[labels >= 0].split([len(row.completion) for row in part])
    return out


@torch.no_grad()
def measured(model: Any, rows: Sequence[Encoded], states: Sequence[Tensor], head: Tensor) -> dict[str, list[float]]:
    """Of each row the means over its trained tokens, in nats: ``kl_to_teacher`` and ``nll`` of the student, ``teacher_nll``.

    Args:
        states, head: the teacher's, as ``completion_states`` gives them.
    """
    out: dict[str, list[float]] = {"kl_to_teacher": [], "nll": [], "teacher_nll": []}
    weight = model.get_output_embeddings().weight
    for row, mine, theirs in zip(rows, completion_states(model, rows), states, strict=True):
        student, teacher = ((at @ w.T).log_softmax(-1) for at, w in ((mine, weight), (theirs, head)))
        labels = torch.tensor(row.completion, device=student.device)[:, None]
        values = {
            "kl_to_teacher": (teacher.exp() * (teacher - student)).sum(-1),
            "nll": -student.gather(-1, labels),
            "teacher_nll": -teacher.gather(-1, labels),
        }
        for name, value in values.items():
            out[name].append(round(float(value.mean()), 5))
    return out
