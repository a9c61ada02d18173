"""The page of a filter, from its document alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtarget.report.page import render_page


def filter_page(document: Mapping[str, Any]) -> str:
    """One HTML document.

    Raises:
        DataError: a number in it is not finite.
    """
    return render_page(
        "filtering.html",
        document,
        title=f"Filter of {document['data']}",
        styles=("filtering.css",),
        scripts=("filtering.js",),
        finding=document["summary"],
    )
