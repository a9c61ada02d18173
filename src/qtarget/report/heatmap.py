"""Tokens as coloured boxes in one picture, drawn with Pillow: a tracker wants an image at every evaluation, cheaply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, MARGIN, LINE, PAD = 1100, 12, 24, 3  # pixels
FONT_SIZE = 15  # pixels
LONGEST_TOKEN = 40  # characters of one token that are drawn
LONGEST_ROW = 400  # tokens of one row that are drawn
INK, SOFT, GROUND, MASKED = (27, 31, 39), (89, 97, 110), (255, 255, 255), (240, 241, 244)
SCALE_WIDTH = 200  # pixels


@dataclass(frozen=True)
class Measure:
    """What colours the tokens.

    Attributes:
        key: of a sample row, ``log_probs`` or ``label_weights``.
        label: with its unit.
        low, high: ends of the colour scale; values beyond them have the end's colour. ``high`` None: the largest value.
    """

    key: str
    label: str
    low: float
    high: float | None


MEASURES = {
    "token_log_probs": Measure("log_probs", "log-prob of the observed token, nats", -8.0, 0.0),
    "token_label_weights": Measure("label_weights", "weight a of the pull to the observed token", 0.0, None),
}
"""Pictures of one evaluation, by the name a tracker shows. -8 nats is about one in 3,000."""


def heatmap_image(rows: Sequence[Mapping[str, Any]], measure: Measure, title: str) -> np.ndarray:
    """Rows of tokens, wrapped, each token on the colour of its value (cividis); untrained tokens grey.

    Args:
        rows: with ``row``, ``tokens`` and ``measure.key`` (None where not trained on), equally long.
        title: one line above the rows.

    Returns:
        ``[height, 1100, 3]`` uint8. Characters that the font (DejaVu Sans) lacks appear as boxes.
    """
    from PIL import Image, ImageDraw

    known = [v for row in rows for v in row[measure.key][:LONGEST_ROW] if v is not None]
    high = max([measure.low + 1e-9, 1.0, *known]) if measure.high is None else measure.high
    boxes, height = layout(rows, measure)
    image = Image.new("RGB", (WIDTH, height), GROUND)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title[:120], fill=INK, font=font())
    _draw_scale(draw, measure, high)
    for x, y, width, text, value in boxes:
        if value is None:
            ground, ink = MASKED, SOFT
        else:
            ground, ink = colour((value - measure.low) / (high - measure.low))
        draw.rectangle((x, y, x + width - 1, y + LINE - 4), fill=ground)
        draw.text((x + PAD, y + 1), text, fill=ink, font=font())
    return np.asarray(image)


def layout(
    rows: Sequence[Mapping[str, Any]], measure: Measure
) -> tuple[list[tuple[int, int, int, str, float | None]], int]:
    """Boxes ``(x, y, width, text, value)`` and the height of the picture, pixels."""
    boxes: list[tuple[int, int, int, str, float | None]] = []
    y = 3 * LINE + MARGIN
    for row in rows:
        x = MARGIN
        tokens = [f"row {row['row'] + 1}:", *map(shown, row["tokens"][:LONGEST_ROW])]
        values = [None, *row[measure.key][:LONGEST_ROW]]
        if len(row["tokens"]) > LONGEST_ROW:
            tokens, values = [*tokens, f"… {len(row['tokens']) - LONGEST_ROW} more"], [*values, None]
        for text, value in zip(tokens, values, strict=True):
            width = _width(text)
            if x + width > WIDTH - MARGIN and x > MARGIN:
                x, y = MARGIN, y + LINE
            boxes.append((x, y, width, text, value))
            x += width + 2
        y += LINE + 10
    return boxes, y + MARGIN


def shown(token: str) -> str:
    """A token's text on one line, spaces and line ends visible.

    Example:
        >>> shown(" a\\n")
        '·a↵'
    """
    text = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    text = "".join(c if c.isprintable() else "�" for c in text) or "∅"
    return text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…"


def colour(share: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ground and ink of a share in [0, 1]: cividis, made to read alike with and without colour-vision deficiency."""
    table = _cividis()
    rgb = table[min(len(table) - 1, max(0, round(share * (len(table) - 1))))]
    luminance = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]
    return rgb, (255, 255, 255) if luminance < 130 else (0, 0, 0)


def _draw_scale(draw: Any, measure: Measure, high: float) -> None:
    y = MARGIN + LINE + 4
    for i in range(SCALE_WIDTH):
        draw.line((MARGIN + i, y, MARGIN + i, y + 12), fill=colour(i / (SCALE_WIDTH - 1))[0])
    text = f"{measure.low:g} to {high:.3g}: {measure.label}; grey: not trained on"
    draw.text((MARGIN + SCALE_WIDTH + 8, y - 3), text, fill=SOFT, font=font())


@lru_cache(4096)
def _width(text: str) -> int:
    return int(font().getlength(text)) + 2 * PAD


@cache
def _cividis() -> list[tuple[int, int, int]]:
    from matplotlib import colormaps

    table = (255 * colormaps["cividis"](np.linspace(0, 1, 256))[:, :3]).round()
    return [(int(r), int(g), int(b)) for r, g, b in table]


@cache
def font() -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), FONT_SIZE)
