"""The page of an evaluation, from its document alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtarget.report.page import render_page


def evaluation_page(document: Mapping[str, Any]) -> str:
    """One HTML document.

    Raises:
        DataError: a number in it is not finite.
    """
    return render_page(
        "evaluation.html",
        document,
        title=f"Evaluation on {document['sets']['data']['file']}",
        styles=("evaluation.css",),
        scripts=("evaluation.js",),
        finding=document["finding"],
    )
