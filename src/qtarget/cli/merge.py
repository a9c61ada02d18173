"""``qtarget merge``: an adapter and its base as one model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qtarget.core.errors import ConfigError

if TYPE_CHECKING:
    from qtarget.evaluation.contenders import Contender


def merge(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, a checkpoint, an adapter's folder.")],
    output: Annotated[Path | None, typer.Option(help="A new folder; default: the run's name and -merged.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights; default: the base's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model under the adapter, if it has moved.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As transformers has it.")] = False,
) -> None:
    """Merge an adapter into its base: a folder that transformers, vLLM and SGLang load."""
    from qtarget.evaluation.contenders import MOVED, find_contender, refuse_missing
    from qtarget.storage.folders import MODEL, check_folder, mark_folder
    from qtarget.storage.models import adapter_base

    found = find_contender(adapter)
    recorded = adapter_base(found.model)
    if recorded is None:
        raise ConfigError(
            f"{adapter} is no adapter: its weights are whole, so there is nothing to merge; use it as it is"
        )
    place = base or recorded
    refuse_missing(place, "--base" if base else f"the base of {adapter}", "" if base else MOVED)
    target = output or default_output(found.model)
    check_folder(target, MODEL, inputs=[place, found.model])
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"--output {target} is not empty; choose a new folder, or delete it")

    from transformers import AutoTokenizer

    from qtarget.integrations.shared.saved.merging import merge_adapter
    from qtarget.storage.models import load_named

    options = {"trust_remote_code": True} if trust_remote_code else {}
    tokenizer = load_named(AutoTokenizer, "tokenizer", found.tokenizer, **options)
    revision = {"revision": found.base_revision} if found.base_revision and not base else {}

    def finish(folder: Path) -> None:
        carry_records(found, folder, target.name)
        mark_folder(folder, MODEL)

    merged = merge_adapter(found.model, place, tokenizer, target, dtype=dtype, finish=finish, **options, **revision)
    for note in (*found.notes, *quantised_training(found), *merged.notes):
        typer.echo(f"note: {note}")
    typer.echo(
        f"{target}: {merged.dtype}; on a probe the adapter moves the logits by up to {merged.effect:.2g} of their standard "
        f"deviation, and the merged model is off by {merged.error:.1g}"
    )


def default_output(model: str) -> Path:
    """Beside the run.

    Example:
        >>> str(default_output("runs/lora")), str(default_output("runs/lora/checkpoint-8"))
        ('runs/lora-merged', 'runs/lora-checkpoint-8-merged')
    """
    path = Path(model)
    if path.name.startswith("checkpoint-") and path.parent.name:
        return path.parent.with_name(f"{path.parent.name}-{path.name}-merged")
    return path.with_name(f"{path.name}-merged")


def carry_records(contender: Contender, folder: Path, name: str) -> None:
    """Let the merged model say of which run it is: the run's record, which `qtarget evaluate` reads, and a card."""
    from qtarget.report.card.document import card_document
    from qtarget.report.card.text import card_text, write_card
    from qtarget.report.runs.records import RUN_FILE

    path = Path(contender.model)
    run = next((place for place in (path, path.parent) if (place / RUN_FILE).is_file()), None)
    if run is None:
        return
    shutil.copyfile(run / RUN_FILE, folder / RUN_FILE)
    write_card(folder, card_text(card_document(run), name, tags=["trl", "sft", "qtarget"], merged=True))


def quantised_training(contender: Contender) -> list[str]:
    """What must be said of an adapter that was trained on a base in 4 or 8 bits."""
    bits = next((bits for bits in (4, 8) if contender.settings.get(f"load_in_{bits}bit")), None)
    if bits is None:
        return []
    return [
        f"the adapter was trained on the base in {bits} bits and is merged into the base's own weights, which differ a little"
    ]
