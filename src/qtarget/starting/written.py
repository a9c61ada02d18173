"""What `qtarget init` writes and says, from what it knows of rows, model and machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import counted, inflected
from qtarget.starting.choices import Fit, Size, epochs, learning_rate
from qtarget.starting.config_file import Line
from qtarget.starting.machine import Machine
from qtarget.starting.survey import Survey, spread

if TYPE_CHECKING:
    from qtarget.data.formats import Reading

ENOUGH_TO_JUDGE = 100
"""Validation rows below which a warning says what they can show."""


@dataclass(frozen=True)
class Known:
    """Rows, model and machine, and what follows.

    Attributes:
        length: ``max_length``, the user's or ours; None: rows are not cut.
        notes: what training will say of the rows, cut to that.
        template: of a model that has none.
        answers_alone: whether answers are trained without their prompts, or None where rows have no turns.
        parted: rows whose one answer was made a completion, because the template marks none; else None.
        bare: the model has a chat template, and rows of text stand without it.
    """

    reading: Reading
    size: Size
    survey: Survey
    machine: Machine
    fit: Fit
    length: int | None
    notes: Sequence[str]
    template: str | None
    answers_alone: bool | None
    parted: Sequence[Any] | None
    packing: bool | None
    bare: bool = False


def beside(output: Path, name: str) -> Path:
    """``run.train.jsonl`` for ``run.yaml``."""
    return output.with_name(f"{output.stem}.{name}")


def config_lines(known: Known, model: str, output: Path, paths: Sequence[Path], copied: Sequence[str]) -> list[Line]:
    """The config, a line a key.

    Args:
        copied: which of ``train`` and ``validation`` are files of ours.
    """
    fits, size, lengths = known.fit, known.size, known.survey.lengths
    sources = [relative(path, output) for path in paths]
    own = beside(output, "train.jsonl").name
    train = own if "train" in copied else sources[0] if len(sources) == 1 else sources
    lines = [
        Line("model_name_or_path", relative(model, output), f"{size.parameters:,} parameters"),
        Line("train_file", train),
        *(
            [Line("validation_file", beside(output, "validation.jsonl").name, "no prompt of the training rows")]
            * ("validation" in copied)
        ),
        Line("target", "sft", "what each token is pulled towards: `qtarget targets`"),
        Line("output_dir", f"runs/{output.stem}/sft", "another target, another folder beside it"),
        Line("num_train_epochs", epochs(len(lengths))),
        Line(
            "learning_rate",
            learning_rate(size.parameters, fits.adapter),
            f"usual for {'adapters' if fits.adapter else 'this size'}; compare tries others",
        ),
        Line("per_device_train_batch_size", fits.batch, f"about {gigabytes(fits.needed)} of memory by estimate"),
        *([Line("gradient_accumulation_steps", fits.accumulation)] * (fits.accumulation > 1)),
        Line("max_length", known.length, f"rows: {spread(lengths)}"),
        Line("bf16", known.machine.bf16, precision(known.machine)),
        Line("activation_checkpointing", fits.checkpointing, "true saves memory and takes time"),
    ]
    if fits.adapter:
        lines += [
            Line("use_peft", True, "all weights with Adam's moments do not fit"),
            Line("lora_target_modules", ["all-linear"]),
        ]
    if known.answers_alone:
        lines.append(Line("assistant_only_loss", True, "answers are trained, prompts are not"))
    if known.packing:
        lines.append(Line("packing", True, "this architecture keeps packed rows apart"))
    if known.template is not None:
        lines.append(
            Line("chat_template_path", beside(output, "chat_template.jinja").name, "the model has none: ChatML")
        )
    return lines


def relative(path: str | Path, output: Path) -> str:
    """A path as the config at ``output`` finds it; a hub name as it is."""
    path = Path(path).expanduser() if Path(path).expanduser().exists() else path
    if not isinstance(path, Path):
        return path
    return str(path) if path.is_absolute() else os.path.relpath(path, output.parent)


def precision(machine: Machine) -> str:
    """Why bfloat16, or why not."""
    if machine.bf16:
        return f"{machine.name} multiplies in bfloat16"
    return f"float32: {machine.name} is not known to multiply in bfloat16"


def gigabytes(count: int) -> str:
    """Bytes in words.

    Example:
        >>> gigabytes(2_300_000_000)
        '2.3 GB'
    """
    return f"{max(count / 1e9, 0.1):.1f} GB"


def summary(known: Known, data: str, training: int, validation: int, trained: int, seed: int) -> list[str]:
    """What was found and chosen, a line each.

    Args:
        training, validation: rows.
        trained: tokens of the training rows that are trained, what ``max_length`` cuts off left out.
    """
    lines = list(known.reading.announced)
    lines += [f"warning: {note}" for note in known.notes]
    lines.append(
        f"{data}: {counted(training, 'row')} to train, {validation:,} to validate (split by prompt, seed {seed})"
        if validation
        else f"{data}: {counted(training, 'row')} to train, none to validate"
    )
    if 0 < validation < ENOUGH_TO_JUDGE:
        lines.append(f"warning: {judging_words(validation)}")
    lines.append(
        f"rows: {spread(known.survey.lengths)}; {counted(trained, 'token')} {inflected(trained, 'are')} trained"
    )
    fits, free = known.fit, gigabytes(known.machine.free)
    how = "an adapter (LoRA)" if fits.adapter else "all weights"
    lines.append(
        f"memory: {how}, {counted(fits.batch, 'row')} at once, about {gigabytes(fits.needed)} of {free} free on "
        f"{known.machine.name}; estimate: parameters, their gradients and moments, activations, logits"
    )
    if not fits.fits:
        step = "take a smaller model" if fits.adapter else "train an adapter (--use_peft true), take a smaller model"
        lines.append(f"warning: by this estimate it does not fit; {step}, or a machine with more memory")
    lines.append(f"precision: {precision(known.machine)}" if known.machine.bf16 else precision(known.machine))
    if known.template is not None:
        lines.append(
            "chat template: the model has none, and the rows are conversations; ChatML is proposed, see the file"
        )
    if known.answers_alone is False:
        lines.append(
            "warning: prompts are trained too: not every row's answers can be told (the template marks none, or the tokenizer "
            "loses them); give all messages but the assistant's `weight: 0` to train answers alone"
        )
    if known.bare:
        lines.append(
            "rows of text are trained as they stand; the model's chat template, which chats with it will use, is for `messages`"
        )
    if known.parted:
        lines.append(
            "answers alone are trained: the template marks none, so each row's one answer is its completion in the copy"
        )
    if known.packing is False:
        lines.append("packing would save padding, and this architecture would mix packed rows up: left out")
    return lines


def judging_words(rows: int) -> str:
    """What so few validation rows can show.

    Example:
        >>> judging_words(12)
        '12 validation rows can show a difference of about 33 points or more; more rows, or a larger --validation, show less'
        >>> judging_words(1)
        '1 validation row can show no difference, however large; more rows, or a larger --validation, show less'
    """
    least = shown_points(rows)
    what = f"a difference of about {least:.0f} points or more" if least < 100 else "no difference, however large"
    return f"{counted(rows, 'validation row')} can show {what}; more rows, or a larger --validation, show less"


def shown_points(rows: int) -> float:
    """The difference between two models that so many rows can show: two standard errors, where the models disagree on a third.

    Beyond 100 there is no such difference.

    Example:
        >>> round(shown_points(12)), round(shown_points(300))
        (33, 7)
    """
    return 200 * (1 / 3 / rows) ** 0.5
