"""`docs/architecture.md` says what is there: its file names, its picture, and how many files a room holds."""

from __future__ import annotations

import re
import sys
from collections import Counter

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "qtarget"
ONE_FILE_IS_ONE_THING = {"targets", "cli"}
"""Rooms that grow with what they list."""


def named() -> list[str]:
    """Files and folders that the page names in backticks."""
    return sorted(set(re.findall(r"`([\w./-]+(?:\.\w+|/))`", PAGE)))


@pytest.mark.parametrize("name", named())
def test_every_file_that_the_page_names_exists(name: str) -> None:
    places = [SOURCE, ROOT, *SOURCE.rglob("*/")]  # `vllm.py` in a list that names its folder first
    assert any((place / name).exists() for place in places), f"docs/architecture.md names {name}, which is nowhere"


def test_every_room_is_named() -> None:
    rooms = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert {name for name in rooms if f"`{name}/`" not in PAGE} == set()


def test_the_picture_is_of_todays_imports() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from draw_architecture import page_with_picture
    finally:
        sys.path.pop(0)
    assert page_with_picture(PAGE) == PAGE, "run `python scripts/draw_architecture.py`"


def test_no_room_is_crowded() -> None:
    modules = Counter(
        path.parent.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.stem != "__init__"
    )
    crowded = {room: count for room, count in modules.items() if count > 12}
    assert set(crowded) <= ONE_FILE_IS_ONE_THING, crowded
