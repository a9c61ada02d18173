"""From the document to README.md: metadata for the hub, and a page for people. A card that somebody edited is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qtarget.storage.files import digest, write_text

CARD = "README.md"
SEAL = re.compile(r"\n*<!-- written by qtarget, ([0-9a-f]{32}) -->\n*$")
"""Last line of a card: a digest of what stands above, which tells a card that somebody edited."""

logger = logging.getLogger(__name__)


def card_text(
    document: Mapping[str, Any],
    name: str,
    *,
    tags: Sequence[str] = (),
    hub_name: str | None = None,
    merged: bool = False,
) -> str:
    """The whole file, sealed.

    Args:
        document: ``card_document``.
        name: of the model.
        tags: for the hub.
        hub_name: ``user/name``, if it has one.
        merged: the adapter is part of the weights.
    """
    from huggingface_hub import ModelCard, ModelCardData

    is_adapter = bool(document["adapter"]) and not merged
    data = ModelCardData(
        base_model=document["base"]["hub"],
        datasets=document["datasets"] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        model_name=name,
        tags=list(
            dict.fromkeys(["generated_from_trainer", *tags, *(f"arxiv:{i}" for i in document["target"]["arxiv"])])
        ),
        eval_results=eval_results(document) or None,
    )
    template = files("qtarget.report").joinpath("templates/card.md").read_text(encoding="utf-8")
    body = "---\n{{ card_data }}\n---\n" + template
    card = ModelCard.from_template(
        data, template_str=body, **{**document, "name": name, "place": hub_name or name, "merged": merged}
    )
    return sealed(re.sub(r"\n{3,}", "\n\n", str(card)))


def eval_results(document: Mapping[str, Any]) -> list[Any]:
    """Numbers of evaluations as the hub's model index has them; else those of the run's own validation rows."""
    found = [_result(*result) for table in document["evaluations"] for result in table["results"]]
    if found:
        return found
    names = {one["name"]: ", ".join(one["files"]) or one["name"] for one in document["data"]}
    return [
        _result(names.get(name, name.removeprefix("eval_")), "nll", numbers["nll, nats a token"])
        for name, numbers in document["results"]["evaluations"].items()
        if "nll, nats a token" in numbers
    ]


def _result(dataset: str, kind: str, value: float) -> Any:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation", dataset_type="custom", dataset_name=dataset, metric_type=kind,
        metric_value=round(float(value), 6), metric_name="nll, nats a token" if kind == "nll" else f"right answers ({kind})",
    )  # fmt: skip


def sealed(text: str) -> str:
    """The text with its digest as last line.

    Example:
        >>> is_sealed(sealed("# A card")), is_sealed(sealed("# A card").replace("A", "My"))
        (True, False)
    """
    text = SEAL.sub("", text).rstrip("\n")
    return f"{text}\n\n<!-- written by qtarget, {digest(text.encode())} -->\n"


def is_sealed(text: str) -> bool:
    """Whether a card is as it was written."""
    found = SEAL.search(text)
    return found is not None and digest(text[: found.start()].rstrip("\n").encode()) == found[1]


def read_tags(path: Path) -> list[str]:
    """The tags of a card that is there."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return []
    card: Any = ModelCard.load(path, ignore_metadata_errors=True)
    return list(card.data.tags or [])


def keep_edited(path: Path) -> Path | None:
    """Move a card that somebody edited, or that another tool wrote, out of the way; returns its new place."""
    if not path.is_file() or is_sealed(path.read_text(encoding="utf-8", errors="replace")):
        return None
    number = sum(1 for _ in path.parent.glob("README.kept-*.md")) + 1
    place = path.with_name(f"README.kept-{number}.md")
    path.rename(place)
    logger.warning("%s was edited, or another tool wrote it; it is %s now, and a new card is written", path, place.name)
    return place


def write_card(folder: Path, text: str) -> Path:
    """Write ``README.md`` into a folder; one that somebody edited is kept beside it."""
    keep_edited(folder / CARD)
    write_text(folder / CARD, text)
    return folder / CARD
