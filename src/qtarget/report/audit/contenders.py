"""Which contenders are worth a comparison on somebody's rows: the one place that says so, before and after there is evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

USUAL = ("sft", "consensus")
"""Without any evidence: the plain way, and the target that was never far behind it in what we measured."""


@dataclass(frozen=True)
class Proposal:
    """What to compare.

    Attributes:
        targets: the baseline first.
        filters: as `qtarget compare --filters` takes them.
    """

    targets: tuple[str, ...] = USUAL
    filters: tuple[str, ...] = ("none", "auto")

    def options(self) -> tuple[str, ...]:
        """Of `qtarget compare`.

        Example:
            >>> " ".join(Proposal().options())
            '--targets sft,consensus --filters none,auto'
        """
        filters = () if self.filters == ("none",) else ("--filters", ",".join(self.filters))
        return ("--targets", ",".join(self.targets), *filters)


def proposal(facts: Mapping[str, Any] | None = None, others: Sequence[str] = USUAL) -> Proposal:
    """sft and others; with a filter, unless the evidence shows one kind of rows.

    Args:
        facts: of the audit; None where nothing is measured yet.
        others: targets that the evidence puts first.

    Example:
        >>> " ".join(proposal({"bad_rows": 0}, ["asft", "sft"]).options())
        '--targets sft,asft'
    """
    one_kind = facts is not None and facts.get("bad_rows") == 0
    return Proposal(tuple(dict.fromkeys(("sft", *others))), ("none",) if one_kind else ("none", "auto"))
