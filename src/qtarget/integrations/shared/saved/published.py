"""A trainer whose saved models can be handed on: a model card, and where generation stops, also beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from qtarget.core.errors import DataError
from qtarget.report.card.document import card_document
from qtarget.report.card.text import CARD, card_text, keep_edited, read_tags, write_card
from qtarget.report.runs.records import RUN_FILE

logger = logging.get_logger(__name__)


class PublishedTrainer(Trainer):
    """Mixed in before TRL's trainers, whose ``create_model_card`` knows neither base folders nor targets."""

    def create_model_card(self, model_name: str | None = None, dataset_name: Any = None, tags: Any = None) -> None:
        """TRL's, and then ours in its place: TRL says under which tags (trackers, jobs), the run's records say the rest.

        A card that somebody edited is kept beside the new one. Before training has begun there are no records, and TRL's
        card stays.
        """
        if not self.is_world_process_zero():
            return
        output = Path(str(self.args.output_dir))
        if not (output / RUN_FILE).is_file():
            super().create_model_card(model_name, dataset_name, tags)  # pyright: ignore[reportArgumentType]
            return
        kept = keep_edited(output / CARD)
        known = read_tags(kept or output / CARD)  # PEFT's among them
        super().create_model_card(model_name, dataset_name, tags)  # pyright: ignore[reportArgumentType]
        self._write_card(output, [*known, *read_tags(output / CARD)])

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Transformers', with a card, and for an adapter the generation config that PEFT does not save.

        PEFT writes an empty form as card, with the path of a local base in its metadata, which the hub refuses; ours takes its
        place, with PEFT's tags.
        """
        output, folder = Path(str(self.args.output_dir)), Path(str(output_dir or self.args.output_dir))
        if self.args.should_save:
            for place in (output, folder):
                keep_edited(place / CARD)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        config, model = peft_config(self.model), self.model
        if config is not None:
            base: Any = model.get_base_model()  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
            if base.generation_config is not None:
                base.generation_config.save_pretrained(folder)
        if (output / RUN_FILE).is_file():
            tags = list(getattr(self, "_tag_names"))  # noqa: B009 - TRL's, unknown to transformers' Trainer
            tags += [tag for tag in read_tags(folder / CARD) if not tag.startswith("base_model:")]
            self._write_card(folder, tags)

    def _write_card(self, folder: Path, tags: list[str]) -> None:
        """In the place of what TRL or PEFT just wrote there; a record that cannot be read costs the card, and no weights."""
        output, hub_name = Path(str(self.args.output_dir)), getattr(self.args, "hub_model_id", None)
        name = hub_name.split("/")[-1] if hub_name else output.resolve().name
        try:
            document = card_document(output, peft=peft_config(self.model))
        except DataError as error:
            logger.warning(f"{folder / CARD} is not qtarget's: {error}")
            return
        (folder / CARD).unlink(missing_ok=True)
        write_card(folder, card_text(document, name, tags=sorted({*tags}), hub_name=hub_name))


def peft_config(model: Any) -> dict[str, Any] | None:
    """The settings of the adapter that a model is trained with; None for a model of its own."""
    return model.active_peft_config.to_dict() if hasattr(model, "active_peft_config") else None
