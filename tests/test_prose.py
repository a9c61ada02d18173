"""No sentence of a page is longer than two lines; code, tables, headings and addresses of links do not count."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests import ROOT

LONGEST = 220
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
ITEM = re.compile(r"([-*]|\d+\.)\s+")


def sentences(markdown: str) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(\||#|!\[|<!--).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", text):
        words = " ".join(paragraph.split())
        words = words[found.end() :] if (found := ITEM.match(words)) else words
        yield from re.split(r"(?<=[.!?])[\"')*]*\s+", words)


def test_what_a_sentence_is() -> None:
    text = (
        "# Head\n\nOne [link](a/b.md), two\nlines. **Bold.** Next?\n\n| a. b | c |\n\n- item one\n- item two. More\n\n"
    )
    text += "```sh\na. b\n```\n"
    assert list(filter(None, sentences(text))) == [
        "One [link], two lines.", "**Bold.", "Next?", "item one", "item two.", "More",
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_sentence_is_longer_than_two_lines(page) -> None:
    long = [one for one in sentences(page.read_text(encoding="utf-8")) if len(one) > LONGEST]
    assert not long, (
        f"{len(long)} sentences over {LONGEST} characters: say one fact a sentence, or make a table; {long}"
    )
