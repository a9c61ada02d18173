"""The page of a comparison, from its document alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtarget.report.page import render_page


def comparison_page(document: Mapping[str, Any]) -> str:
    """One HTML document.

    Raises:
        DataError: a number in it is not finite.
    """
    return render_page(
        "comparison.html",
        document,
        title=f"Comparison on {document['sets']['data']['file']}",
        styles=("evaluation.css", "comparison.css"),
        scripts=("comparison.js",),
        finding=document["finding"],
    )
